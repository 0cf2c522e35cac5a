"""`megatron-cpt checkpoints`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from megatron_cpt.budget import parse_count
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.runs.checkpoints import (
    complete_checkpoints,
    format_bytes,
    read_best,
    remove_checkpoint,
    remove_partials,
)
from megatron_cpt.runs.folder import RunFolder, read_resolved
from megatron_cpt.runs.lease import refuse_if_held
from megatron_cpt.runs.retention import Retention
from megatron_cpt.runs.views import checkpoints_json, retention_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare sizes and hashes with the marker; exit 1 for any damage.")
@click.option("--prune", is_flag=True, help="Delete what the run's own retention lets go, and abandoned saves.")
@click.option(
    "--keep-last", type=click.IntRange(min=1), help="With --prune: newest ones kept, instead of checkpoint.keep_last."
)
@click.option(
    "--keep-every",
    metavar="TOKENS",
    help="With --prune: keep the first at or after each multiple (100M, 1.5B, or none), instead of "
    "checkpoint.keep_every.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def checkpoints(
    run: Path, verify: bool, prune: bool, keep_last: int | None, keep_every: str | None, as_json: bool
) -> int:
    """List the checkpoints of the run in the folder RUN, oldest first.

    --prune keeps what the run's own config keeps (RUN/resolved.yaml: checkpoint.keep_last, checkpoint.keep_every, and
    the best one); --keep-last and --keep-every replace its values for this call.
    """
    folder = RunFolder(run)
    if not folder.checkpoints.is_dir():
        raise CheckpointError(f"{run} has no folder of checkpoints", hint="give the run_dir of a run")
    if not prune and (keep_last is not None or keep_every is not None):
        raise ConfigError("--keep-last and --keep-every say what --prune keeps", hint="add --prune, or leave them out")
    retention = _retention(folder, keep_last, keep_every) if prune else None
    removed = _prune(folder, retention) if retention else []
    rows = checkpoints_json(folder, verify=verify)
    if as_json:
        kept = {"retention": retention_json(retention)} if retention else {}
        click.echo(json.dumps({"run_dir": str(run), "checkpoints": rows, "removed": removed, **kept}, indent=1))
    else:
        if retention:
            click.echo(_retention_text(retention, keep_last, keep_every))
        _print(rows, removed)
    return int(any(row["faults"] for row in rows))


def _retention(folder: RunFolder, keep_last: int | None, keep_every: str | None) -> Retention:
    """The run's own retention, with what the flags replace."""
    retention = Retention.from_config(read_resolved(folder))
    if keep_last is not None:
        retention = replace(retention, keep_last=keep_last)
    if keep_every is not None:
        retention = replace(retention, keep_every_tokens=_parse_keep_every(keep_every))
    return retention


def _parse_keep_every(text: str) -> int | None:
    if text == "none":
        return None
    try:
        tokens = parse_count(text)
        if tokens == 0:
            raise ValueError("0 is no distance between checkpoints")
    except ValueError as error:
        raise ConfigError(f"--keep-every: {error}", hint="for example --keep-every 100M, or none") from error
    return tokens


def _prune(folder: RunFolder, retention: Retention) -> list[str]:
    refuse_if_held(folder.lease)
    best = read_best(folder.checkpoints)
    gone = retention.removable(complete_checkpoints(folder.checkpoints), best["iteration"] if best else None)
    for path in gone:
        remove_checkpoint(path)
    remove_partials(folder.checkpoints)
    return [str(path) for path in gone]


def _retention_text(retention: Retention, keep_last: int | None, keep_every: str | None) -> str:
    every = retention.keep_every_tokens
    tokens = "none" if every is None else f"{every:,} tokens"
    return (
        f"kept: the newest {retention.keep_last} ({_source(keep_last, '--keep-last')}), "
        f"one every: {tokens} ({_source(keep_every, '--keep-every')}), "
        + (f"one at the end of each of {len(retention.phase_ends)} phases, " if retention.phase_ends else "")
        + "and the best"
    )


def _source(flag: object, name: str) -> str:
    return "the run's config" if flag is None else f"{name} instead of the run's config"


def _print(rows: list[dict[str, Any]], removed: list[str]) -> None:
    for path in removed:
        click.echo(f"removed {path}")
    if not rows:
        click.echo("no checkpoints")
    for row in rows:
        if row["complete"]:
            losses = "  ".join(f"{name} {loss:.4f}" for name, loss in row["validation"].items())
            click.echo(
                f"{row['path']}  {row['consumed_tokens']:,} tokens  {format_bytes(row['bytes'])}  {row['created']}"
                + (f"  {losses}" if losses else "")
                + ("  best" if row["best"] else "")
            )
        elif row["faults"]:
            click.echo(f"{row['path']}  cannot be used and is kept")
        else:
            click.echo(f"{row['path']}  incomplete: it has no complete.json and is never loaded")
        for fault in row["faults"]:
            click.echo(f"  damaged: {fault}" if row["complete"] else f"  {fault}")
