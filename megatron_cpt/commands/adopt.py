"""`megatron-cpt adopt`: a manifest for a dataset that another tool wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from checkpoint_convert.embedding import EMBEDDING, row_norms
from checkpoint_convert.hf import read_hf
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.corpus.dataset.adopt import Adoption, adopt_dataset


@click.command()
@click.argument("prefix")
@click.option("--tokenizer", required=True, help="Tokenizer that wrote it: model folder or tokenizer file.")
@click.option("--eod-token", help="Token that ends documents; default: see docs/corpus.md.")
@click.option("--model", type=click.Path(path_type=Path), help="Model folder: find ids that it never learned.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def adopt(prefix: str, tokenizer: str, eod_token: str | None, model: Path | None, as_json: bool) -> None:
    """Prove the dataset PREFIX of another tool and write its manifest.

    \b
    PREFIX.bin and PREFIX.idx, as Megatron-LM writes them, stay as they are:
      megatron-cpt adopt data/corpus_text_document --tokenizer MODEL_DIR
    """
    norms = None if model is None else (lambda: row_norms(read_hf(model, read_architecture(model)).tensors[EMBEDDING]))
    adoption = adopt_dataset(prefix, tokenizer, eod_token, norms)
    if as_json:
        click.echo(json.dumps({"prefix": prefix} | asdict(adoption)))
    else:
        click.echo(_text(prefix, adoption))


def _text(prefix: str, adoption: Adoption) -> str:
    lines = [f"{prefix}: adopted"]
    lines += [f"  proven   {fact}" for fact in adoption.proven]
    lines += [f"  unknown  {fact}" for fact in adoption.unknown]
    lines += [f"  sample   {text!r}" for text in adoption.samples]
    return "\n".join(lines)
