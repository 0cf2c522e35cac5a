"""Megatron-LM's merge_datasets.py habits: join all datasets of a folder, sorted by name.

python tools/merge_datasets.py --input FOLDER --output-prefix PREFIX
"""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cpt.cli import run
from megatron_cpt.console import print_summary
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.errors import DataError

PARTS = (".bin", ".idx", ".partial")  # of a dataset, one is enough to be noticed; .partial is of one half-written


@click.command()
@click.option("--input", "folder", required=True, type=click.Path(path_type=Path), help="Folder with .bin/.idx pairs.")
@click.option("--output-prefix", required=True, help="PREFIX of the joined dataset.")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
def main(folder: Path, output_prefix: str, overwrite: bool) -> None:
    """Join all datasets of FOLDER into one."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", hint="give the folder that holds the .bin/.idx pairs")
    prefixes = datasets_of(folder)
    output = Path(output_prefix)
    if output.name in {Path(prefix).name for prefix in prefixes} and output.parent.resolve() == folder.resolve():
        raise DataError(
            f"{output_prefix} lies in {folder} itself, so it would be joined with its own parts",
            hint="choose an --output-prefix outside of the folder",
        )
    manifest = merge_datasets(prefixes, output_prefix, overwrite=overwrite)
    print_summary(f"{output_prefix}: {manifest.document_count:,} documents, {manifest.token_count:,} tokens")


def datasets_of(folder: Path) -> list[str]:
    """PREFIX of every dataset in a folder by name, of damaged ones too: whoever opens them refuses those."""
    found = (entry for entry in folder.iterdir() if entry.suffix in PARTS and not entry.name.startswith("."))
    return sorted({str(entry.with_suffix("")) for entry in found})


if __name__ == "__main__":
    run(main)
