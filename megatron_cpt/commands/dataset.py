"""`megatron-cpt verify`, `inspect`, `merge`, `split` and `dedup`: work on finished datasets."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from pydantic import ValidationError

from megatron_cpt.commands.preprocess import parse_split
from megatron_cpt.console import print_summary
from megatron_cpt.corpus.dataset.describe import describe_dataset
from megatron_cpt.corpus.dataset.manifest import Manifest
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.corpus.dataset.soundness import not_sound
from megatron_cpt.corpus.dataset.split import split_dataset
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.dedup.dedup_datasets import dedup_datasets
from megatron_cpt.corpus.schema_processing import Dedup, Near


@click.command()
@click.argument("prefix")
@click.option("--tokenizer", help="Also check the tokenizer's fingerprint and decode a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(prefix: str, tokenizer: str | None, as_json: bool) -> None:
    """Prove the dataset PREFIX sound in one pass: sizes, offsets, ids, EOD, sha256."""
    result = verify_dataset(prefix, tokenizer)
    if as_json:
        click.echo(json.dumps(asdict(result) | {"ok": result.ok}))
    elif result.ok:
        click.echo("\n".join([f"{prefix}: sound", *(f"  ok  {check}" for check in result.checks)]))
    if not result.ok:
        raise not_sound(prefix, result.problems)


@click.command()
@click.argument("prefix")
@click.option("--tokenizer", help="Show text as well as ids.")
@click.option("--documents", default=3, show_default=True, help="How many documents to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(prefix: str, tokenizer: str | None, documents: int, as_json: bool) -> None:
    """Show the manifest, length statistics and first documents of the dataset PREFIX."""
    described = describe_dataset(prefix, documents, tokenizer)
    described["manifest"] = asdict(described["manifest"])
    click.echo(json.dumps(described) if as_json else _text(described))


def _text(described: dict[str, Any]) -> str:
    manifest = described["manifest"]
    tokenizer = manifest["tokenizer"]
    lines = [
        f"{described['prefix']}: {manifest['document_count']:,} documents, {manifest['sequence_count']:,} sequences, "
        f"{manifest['token_count']:,} tokens ({manifest['dtype']}, {manifest['bin_bytes']:,} bytes)",
        f"tokenizer {tokenizer['name']} ({tokenizer['kind']}, vocabulary {tokenizer['vocab_size']:,}), "
        f"EOD {tokenizer['eod_token']!r} = {tokenizer['eod_id']}, appended: {manifest['append_eod']}",
        "tokens per document: " + "  ".join(f"{k} {v:,}" for k, v in described["document_tokens"].items()),
    ]
    lines += [
        f"source {s['name']}: {s['files']} files, {s['documents']:,} documents, "
        f"{s['tokens']:,} tokens ({s['share']:.1%})"
        for s in manifest["sources"]
    ]
    lines += [f"rejected in the run: {reason} {count:,}" for reason, count in manifest["rejects"].items()]
    for document in described["documents"]:
        lines.append(
            f"document {document['document']}: {document['tokens']:,} tokens  "
            f"{document['first_ids']} ... {document['last_ids']}"
        )
        if "text_start" in document:
            lines += [f"  begins {document['text_start']!r}", f"  ends   {document['text_end']!r}"]
    return "\n".join(lines)


@click.command()
@click.argument("prefixes", nargs=-1, required=True)
@click.option("--output-prefix", required=True, help="PREFIX of the joined dataset.")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(prefixes: tuple[str, ...], output_prefix: str, overwrite: bool, as_json: bool) -> None:
    """Join the datasets PREFIXES, of one tokenizer, into one, in the order given."""
    manifest = merge_datasets(prefixes, output_prefix, overwrite=overwrite)
    if as_json:
        print_summary(json.dumps({"prefix": output_prefix} | asdict(manifest)))
    else:
        print_summary(f"{output_prefix}: {manifest.document_count:,} documents, {manifest.token_count:,} tokens")


@click.command()
@click.argument("prefix")
@click.option("--split", "fractions", required=True, callback=parse_split, help="E.g. train=0.98,valid=0.02.")
@click.option("--overwrite", is_flag=True, help="Replace datasets that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def split(prefix: str, fractions: dict[str, float], overwrite: bool, as_json: bool) -> None:
    """Split the dataset PREFIX by document into PREFIX_NAME for each name."""
    datasets = split_dataset(prefix, fractions, overwrite=overwrite)
    _print_datasets(datasets, as_json)


def parse_similarity(_: click.Context, __: click.Parameter, value: float) -> Near:
    """The rule for near-duplicates of this similarity."""
    try:
        return Near(similarity=value)
    except ValidationError as error:
        raise click.BadParameter(f"{value} {error.errors()[0]['msg'].lower()}") from error


@click.command()
@click.argument("prefixes", nargs=-1, required=True)
@click.option("--output-prefix", required=True, help="PREFIX of the dataset without duplicates.")
@click.option("--near", is_flag=True, help="Also near-duplicates.")
@click.option(
    "--similarity", default=0.6, show_default=True, callback=parse_similarity, help="Of near-duplicates, at least."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def dedup(
    prefixes: tuple[str, ...],
    output_prefix: str,
    near: bool,
    similarity: Near,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Join the datasets PREFIXES, of one tokenizer, without duplicate documents."""
    rules = Dedup(near=similarity if near else None)
    manifest = dedup_datasets(prefixes, output_prefix, rules, workers=workers, overwrite=overwrite)
    _print_datasets({output_prefix: manifest}, as_json)


def _print_datasets(datasets: dict[str, Manifest], as_json: bool) -> None:
    if as_json:
        print_summary(json.dumps({"datasets": {prefix: asdict(manifest) for prefix, manifest in datasets.items()}}))
        return
    for prefix, manifest in datasets.items():
        dropped = "".join(f", {reason} {count:,}" for reason, count in manifest.rejects.items())
        print_summary(f"{prefix}: {manifest.document_count:,} documents, {manifest.token_count:,} tokens{dropped}")
