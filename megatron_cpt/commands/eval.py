"""`megatron-cpt eval`: measure a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_cpt.commands.eval_tasks import tasks
from megatron_cpt.console import ProgressBar
from megatron_cpt.errors import DataError

if TYPE_CHECKING:
    from checkpoint_convert.checkpoint import IndexedCheckpoint
    from megatron_cpt.eval.perplexity import Perplexity
    from megatron_cpt.eval.settings import EvalSettings

logger = logging.getLogger(__name__)

DEFAULT_SEQ_LENGTH = 1024


@click.group()
def eval_group() -> None:
    """Measure a model."""


eval_group.add_command(tasks)


@eval_group.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, multiple=True, help="PREFIX of a dataset, or text; may be given several times.")
@click.option("--json-key", default="text", show_default=True, help="Key of the text in jsonl and parquet.")
@click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    help="Tokens per block [default: the run's; else 1024 or the model's limit].",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens to predict per data [default: those that the run validates on; else all].",
)
@click.option(
    "--document-attention/--no-document-attention",
    default=None,
    help="Whether a token attends to its own document only [default: as the run; else no].",
)
@click.option(
    "--window", type=click.IntRange(min=1), help="Another name of --seq-length, where --stride makes windows overlap."
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens between the beginnings of two windows; each token is counted once. [default: no overlap]",
)
@click.option("--per-document", is_flag=True, help="Begin anew with each document; its first token is not predicted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def perplexity(
    model: Path,
    data: tuple[str, ...],
    json_key: str,
    seq_length: int | None,
    max_tokens: int | None,
    document_attention: bool | None,
    window: int | None,
    stride: int | None,
    per_document: bool,
    as_json: bool,
) -> None:
    """Perplexity of MODEL on a dataset or a text.

    MODEL is a Hugging Face directory (run by transformers), or a Megatron checkpoint or run folder (run by
    Megatron-Core in one process). The documents are packed and cut into blocks of --seq-length tokens; each token
    but the first is predicted once, and the loss is the mean over all of them. For a run and its checkpoints the
    defaults are the run's own, and the number is that of its validation. Bits per byte of text compare models of
    different tokenizers.

    \b
    Each token from at least 3,584 tokens before it, the usual number for long texts:
      megatron-cpt eval perplexity MODEL --data text.jsonl --window 4096 --stride 512
    """
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval.model import load_scorer
    from megatron_cpt.eval.perplexity import perplexity as measure
    from megatron_cpt.eval.perplexity import predicted_ranges
    from megatron_cpt.eval.token_stream import open_token_stream, text_bytes

    if window is not None and seq_length not in (None, window):
        raise click.UsageError("--window and --seq-length are one thing: give one of them")
    seq_length = window if seq_length is None else seq_length
    found = open_checkpoint(model)
    used = _settings(found, model, seq_length, max_tokens, document_attention)
    streams = [open_token_stream(name, found.side_dir, found.arch.vocab_size, json_key) for name in data]
    logger.info("loading %s (%s)", found.path, found.format)
    scorer = load_scorer(found, used.seq_length, document_attention=used.document_attention)
    results: list[dict[str, Any]] = []
    for stream in streams:
        with ProgressBar(stream.name, 0, "tokens") as bar:
            result = measure(
                scorer,
                stream,
                used.seq_length,
                used.max_tokens,
                bar.update,
                document_attention=used.document_attention,
                stride=stride,
                per_document=per_document,
            )
        ranges = predicted_ranges(stream, used.max_tokens, per_document=per_document)
        size = text_bytes(stream, ranges, found.side_dir)
        row = {"model": str(model), "data": stream.name, **_measured(result, size)}
        results.append(row | {"per_document": per_document, "document_attention": used.document_attention})
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else {"model": str(model), "results": results}))
        return
    for row in results:
        click.echo(_line(row))


def _measured(result: Perplexity, size: int | None) -> dict[str, Any]:
    """The outcome as JSON; `size` is the text's bytes, None where they are not known."""
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": None if size is None else result.bits_per_byte(size),
        "tokens": result.tokens,
        "text_bytes": size,
        "documents": result.documents,
        "seq_length": result.seq_length,
        "stride": result.stride,
    }


def _line(row: dict[str, Any]) -> str:
    """The outcome for a person."""
    bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f} bits per byte, "
    cut = f"blocks of {row['seq_length']}"
    if row["stride"] < row["seq_length"]:
        cut = f"windows of {row['seq_length']} with a stride of {row['stride']}"
    return (
        f"{row['data']}: perplexity {row['perplexity']:.4f}, loss {row['loss']:.6f} nats per token, {bits}"
        f"{row['tokens']:,} tokens of {row['documents']:,} documents in {cut}"
        f"{', each document by itself' if row['per_document'] else ''}"
    )


def _settings(
    found: IndexedCheckpoint,
    model: Path,
    seq_length: int | None,
    max_tokens: int | None,
    document_attention: bool | None,
) -> EvalSettings:
    """Return how to measure: what was asked for, then what the run did, then this command's defaults."""
    from megatron_cpt.eval.settings import EvalSettings, settings_of_run

    limit = found.arch.positions
    if seq_length is not None and seq_length > limit:
        raise DataError(f"--seq-length {seq_length} is more than {model} attends to ({limit})", hint=f"at most {limit}")
    default = EvalSettings(min(DEFAULT_SEQ_LENGTH, limit), document_attention=False, max_tokens=None)
    if found.run_config is not None and None in (seq_length, max_tokens, document_attention):
        default = settings_of_run(found.run_config)
    return EvalSettings(
        default.seq_length if seq_length is None else seq_length,
        default.document_attention if document_attention is None else document_attention,
        default.max_tokens if max_tokens is None else max_tokens,
    )
