"""Give a Hugging Face model new tokens for a domain, with rows that are the mean of their old pieces.

python tools/extend_vocabulary.py --model MODEL_DIR --input domain.jsonl --count 500 --output NEW_MODEL_DIR
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from megatron_cpt.cli import run
from megatron_cpt.console import print_summary
from megatron_cpt.corpus.documents import UnitTally
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.schema import parse_corpus
from megatron_cpt.corpus.tokenizers.vocabulary import extend_model, extend_tokenizer, propose_tokens
from megatron_cpt.errors import DataError


def texts_of(inputs: tuple[str, ...], text: str) -> Iterator[str]:
    raw = {"output_prefix": "", "tokenizer": "", "sources": [{"files": list(inputs), "text": text}]}
    corpus = parse_corpus(raw, "--input")
    for unit in plan_units(corpus):
        for batch in read_unit(unit, UnitTally(), corpus.max_document_bytes):
            yield from batch.texts


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Hugging Face model folder.")
@click.option("--input", "inputs", required=True, multiple=True, help="Domain text; may be given several times.")
@click.option("--json-key", default="text", show_default=True, help="Key of the text.")
@click.option("--count", required=True, type=click.IntRange(min=1), help="Tokens to add, at most.")
@click.option("--min-occurrences", default=20, show_default=True, help="Words seen less often are left alone.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New model folder.")
def main(model: Path, inputs: tuple[str, ...], json_key: str, count: int, min_occurrences: int, output: Path) -> None:
    """Add domain words to a model's vocabulary and weights."""
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} is not empty", hint="choose a new folder")
    tokens = propose_tokens(texts_of(inputs, json_key), model, count, min_occurrences)
    if not tokens:
        raise DataError("no word is frequent enough and more than one token", hint="lower --min-occurrences")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    extension = extend_tokenizer(model, tokens, partial)
    rows = extend_model(model, extension, partial)
    partial.replace(output)  # an empty folder of that name is replaced
    print_summary(f"{len(tokens):,} tokens added, the first {tokens[:8]}; {rows:,} embedding rows; {output}")


if __name__ == "__main__":
    run(main)
