"""`megatron-cpt preprocess`: a corpus.yaml or flags to .bin/.idx datasets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import click

from megatron_cpt.console import ProgressBar, print_summary
from megatron_cpt.corpus.documents import NONSTANDARD_JSON, unknown_text
from megatron_cpt.corpus.run.corpus_run import OnUnit, StartProgress
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.corpus.run.preprocess import Outcome, preprocess_shard
from megatron_cpt.corpus.run.preprocess import preprocess as run_preprocess
from megatron_cpt.corpus.schema import Corpus, load_corpus, parse_corpus, split_fault

log = logging.getLogger(__name__)

# What a file of a run holds, by the part of its name before the suffix.
_ABOUT = {
    "documents": "  (where each document came from)",
    "report": "  (open it in a browser)",
    "rejects": "  (each rejected document with its place and reason)",
    "duplicates": "  (which documents are duplicates of which)",
}


def parse_split(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, float]:
    """`train=0.98,valid=0.02` as a mapping."""
    if not value:
        return {}
    try:
        pairs = [(name.strip(), float(part)) for name, part in (item.split("=") for item in value.split(","))]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not NAME=FRACTION,NAME=FRACTION") from None
    fractions = dict(pairs)
    if len(fractions) < len(pairs):
        raise click.BadParameter(f"{value!r} has a name twice")
    if fault := split_fault(fractions):
        raise click.BadParameter(fault)
    return fractions


def parse_shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`K/N` as (K, N) with 0 <= K < N."""
    if value is None:
        return None
    number, slash, count = value.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise click.BadParameter(f"{value!r} is not K/N with K from 0 to N - 1")
    return int(number), int(count)


@click.command()
@click.argument("files", nargs=-1, metavar="[CORPUS.yaml | more input files]")
@click.option("--input", "inputs", multiple=True, help="Input files, folders or globs; several may follow.")
@click.option("--output-prefix", help="PREFIX of the dataset: PREFIX.bin, .idx, .manifest.json.")
@click.option("--tokenizer", help="Model folder or tokenizer.json.")
@click.option("--json-key", help="Key of the text in jsonl and parquet.  [default: text]")
@click.option("--eod-token", help="End-of-document token; default: see docs/corpus.md.")
@click.option("--append-eod/--no-append-eod", default=None, help="End each document with EOD.  [default: append]")
@click.option("--split", callback=parse_split, help="Split by document, e.g. train=0.98,valid=0.02.")
@click.option("--special-tokens-in-text", type=click.Choice(["literal", "parse", "reject"]))
@click.option("--max-reject-ratio", type=float, help="Fail above this ratio of unreadable documents.  [default: 0.001]")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--overwrite", is_flag=True, help="Replace datasets of another input, configuration or tokenizer.")
@click.option("--shard", callback=parse_shard, help="K/N: only every N-th unit from K on; a run without it finishes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def preprocess(
    files: tuple[str, ...],
    inputs: tuple[str, ...],
    workers: int | None,
    overwrite: bool,
    shard: tuple[int, int] | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Tokenise raw text into .bin/.idx datasets.

    \b
    megatron-cpt preprocess CORPUS.yaml
    megatron-cpt preprocess --input a.jsonl b.jsonl --output-prefix data/corpus --tokenizer MODEL_DIR
    """
    corpus = _corpus(files, inputs, flags)
    with unit_progress() as start:
        if shard is not None:
            done = preprocess_shard(corpus, *shard, workers=workers, start_progress=start)
            fields = {"shard": shard[0], "shards": shard[1], "units": done}
            print_summary(json.dumps(fields) if as_json else f"shard {shard[0]} of {shard[1]}: {done} units done")
            return
        outcome = run_preprocess(corpus, workers=workers, overwrite=overwrite, start_progress=start)
    print_summary(json.dumps(outcome_fields(outcome)) if as_json else outcome_text(outcome))


@contextmanager
def unit_progress() -> Iterator[StartProgress]:
    """Yield a function that opens a progress bar for a stage of a run, or names a stage whose bytes are not counted."""
    with ExitStack() as opened:

        def start(stage: str, total_bytes: int) -> OnUnit:
            opened.close()  # the stage before
            if not total_bytes:
                log.info("%s", stage)
                return lambda record: None
            bar = opened.enter_context(ProgressBar(stage, total_bytes, "bytes"))
            tokens = rejects = done_bytes = 0

            def on_unit(record: UnitRecord) -> None:
                nonlocal tokens, rejects, done_bytes
                tokens += sum(part.tokens for part in record.parts.values())
                rejects += sum(record.reject_counts.values())
                done_bytes += record.size_bytes
                bar.update(done_bytes, words=(f"{tokens / 1e6:,.1f} M tokens", f"{rejects:,} rejects"))

            return on_unit

        yield start


def _corpus(files: tuple[str, ...], inputs: tuple[str, ...], flags: dict[str, Any]) -> Corpus:
    """The corpus that the arguments describe: a YAML file, or the flags."""
    given = {name: value for name, value in flags.items() if value not in (None, {})}
    if not inputs:
        if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
            raise click.UsageError("give one CORPUS.yaml, or --input FILES --output-prefix PREFIX --tokenizer T")
        if given:
            raise click.UsageError(f"{', '.join('--' + n.replace('_', '-') for n in given)}: set it in {files[0]}")
        return load_corpus(files[0])
    for name in ("output_prefix", "tokenizer"):
        if name not in given:
            raise click.UsageError(f"--{name.replace('_', '-')} is required with --input")
    source = {"files": [*inputs, *files], "text": given.pop("json_key", "text")}
    return parse_corpus({**given, "sources": [source]}, "command line")


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """The JSON object of a run: one entry per dataset, without the config that its manifest holds."""
    datasets = {
        prefix: {key: value for key, value in asdict(manifest).items() if key != "config"}
        for prefix, manifest in outcome.datasets.items()
    }
    return asdict(outcome) | {"datasets": datasets}


def outcome_text(outcome: Outcome) -> str:
    lines = ["already done, nothing to do"] if outcome.already_done else []
    for prefix, manifest in outcome.datasets.items():
        lines.append(
            f"{prefix}: {manifest.document_count:,} documents, {manifest.token_count:,} tokens, "
            f"{manifest.dtype}, EOD {manifest.tokenizer.eod_token!r} = {manifest.tokenizer.eod_id}"
        )
    lines.append(f"documents read: {outcome.documents_read:,}; rejected: {sum(outcome.rejects.values()):,}")
    most_first = sorted(outcome.rejects.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"  {reason}: {count:,}" for reason, count in most_first]
    config = next(iter(outcome.datasets.values())).config
    if "passages_removed" in config:
        removed, chars = config["passages_removed"], config["passage_chars_removed"]
        lines.append(f"repeated passages removed within documents: {removed:,} ({chars:,} characters)")
    if count := outcome.notes.get(NONSTANDARD_JSON):
        lines.append(f"kept although their line is not standard JSON (NaN, Infinity, a lone surrogate): {count:,}")
    if unknown := unknown_text(outcome.notes):
        lines.append(unknown)
    lines.append("files:")
    lines += [f"  {file}{_ABOUT.get(file.rpartition('.')[0].rpartition('.')[2], '')}" for file in outcome.files]
    return "\n".join(lines)
