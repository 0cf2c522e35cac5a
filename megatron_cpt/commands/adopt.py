"""`megatron-cpt adopt`: a manifest for a dataset that another tool wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from checkpoint_convert.hf import read_hf
from checkpoint_convert.rows import Files, read_rows
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.adopt import Adoption, adopt_dataset

EMBEDDING = "model.embed_tokens.weight"
ROWS_PER_READ = 4096


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
    norms = None if model is None else (lambda: embedding_norms(model))
    adoption = adopt_dataset(prefix, tokenizer, eod_token, norms)
    if as_json:
        click.echo(json.dumps({"prefix": prefix} | asdict(adoption)))
    else:
        click.echo(_text(prefix, adoption))


def embedding_norms(model_dir: Path) -> Array:
    """Return the norm of each row of a Hugging Face model's embedding, float32 [rows], a few rows at a time."""
    tensor = read_hf(model_dir, read_architecture(model_dir)).tensors[EMBEDDING]
    norms = np.empty(tensor.shape[0], np.float32)
    with Files() as files:
        for start in range(0, tensor.shape[0], ROWS_PER_READ):
            stop = min(start + ROWS_PER_READ, tensor.shape[0])
            rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
            read_rows(files, tensor, start, stop, rows)
            norms[start:stop] = np.linalg.norm(_as_float(rows, tensor.dtype), axis=1)
    return norms


def _as_float(rows: Array, dtype: str) -> Array:
    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.view({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)


def _text(prefix: str, adoption: Adoption) -> str:
    lines = [f"{prefix}: adopted"]
    lines += [f"  proven   {fact}" for fact in adoption.proven]
    lines += [f"  unknown  {fact}" for fact in adoption.unknown]
    lines += [f"  sample   {text!r}" for text in adoption.samples]
    return "\n".join(lines)
