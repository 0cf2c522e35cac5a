"""`megatron-cpt eval`: measure a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click

from megatron_cpt.console import ProgressBar
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_SEQ_LENGTH = 1024


@click.group()
def eval_group() -> None:
    """Measure a model."""


@eval_group.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, multiple=True, help="PREFIX of a dataset, or text; may be given several times.")
@click.option("--json-key", default="text", show_default=True, help="Key of the text in jsonl and parquet.")
@click.option("--seq-length", type=click.IntRange(min=1), help="Tokens per block [default: 1024 or the model's limit].")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens to predict per data [default: all].")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def perplexity(
    model: Path, data: tuple[str, ...], json_key: str, seq_length: int | None, max_tokens: int | None, as_json: bool
) -> None:
    """Perplexity of MODEL on a dataset or a text.

    MODEL is a Hugging Face directory (run by transformers), or a Megatron checkpoint or run folder (run by
    Megatron-Core in one process). The documents are packed and cut into blocks of --seq-length tokens; each token
    but the first is predicted once, and the loss is the mean over all of them.
    """
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval.model import load_scorer
    from megatron_cpt.eval.perplexity import perplexity as measure
    from megatron_cpt.eval.token_stream import open_token_stream

    found = open_checkpoint(model)
    length = _seq_length(seq_length, found.arch.max_position_embeddings, model)
    streams = [open_token_stream(name, found.side_dir, found.arch.vocab_size, json_key) for name in data]
    logger.info("loading %s (%s)", found.path, found.format)
    score = load_scorer(found, length)
    results: list[dict[str, Any]] = []
    for stream in streams:
        with ProgressBar(stream.name, 0, "tokens") as bar:
            result = measure(score, stream, length, max_tokens, bar.update)
        results.append(
            {
                "model": str(model),
                "data": stream.name,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "documents": result.documents,
                "seq_length": result.seq_length,
            }
        )
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else {"model": str(model), "results": results}))
        return
    for row in results:
        click.echo(
            f"{row['data']}: perplexity {row['perplexity']:.4f}, loss {row['loss']:.6f} nats per token, "
            f"{row['tokens']:,} tokens of {row['documents']:,} documents in blocks of {length}"
        )


def _seq_length(asked: int | None, limit: int, model: Path) -> int:
    if asked is None:
        return min(DEFAULT_SEQ_LENGTH, limit)
    if asked > limit:
        raise DataError(f"--seq-length {asked} is more than {model} attends to ({limit})", hint=f"at most {limit}")
    return asked
