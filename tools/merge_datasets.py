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


@click.command()
@click.option("--input", "folder", required=True, type=click.Path(path_type=Path), help="Folder with .bin/.idx pairs.")
@click.option("--output-prefix", required=True, help="PREFIX of the joined dataset.")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
def main(folder: Path, output_prefix: str, overwrite: bool) -> None:
    """Join all datasets of FOLDER into one."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", hint="give the folder that holds the .bin/.idx pairs")
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    manifest = merge_datasets(prefixes, output_prefix, overwrite=overwrite)
    print_summary(f"{output_prefix}: {manifest.document_count:,} documents, {manifest.token_count:,} tokens")


if __name__ == "__main__":
    run(main)
