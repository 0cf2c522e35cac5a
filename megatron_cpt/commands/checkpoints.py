"""`megatron-cpt checkpoints`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from megatron_cpt.budget import parse_count
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.runs.checkpoints import (
    Checkpoint,
    complete_checkpoints,
    faults,
    format_bytes,
    list_checkpoints,
    read_best,
    removable,
    remove_checkpoint,
    remove_partials,
)
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.lease import refuse_if_held


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare sizes and hashes with the marker; exit 1 for any damage.")
@click.option("--prune", is_flag=True, help="Delete what --keep-last and --keep-every let go, and abandoned saves.")
@click.option("--keep-last", type=click.IntRange(min=1), default=2, show_default=True, help="Newest ones kept.")
@click.option("--keep-every", metavar="TOKENS", help="Also keep the first at or after each multiple (100M, 1.5B).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def checkpoints(run: Path, verify: bool, prune: bool, keep_last: int, keep_every: str | None, as_json: bool) -> int:
    """List the checkpoints of the run in the folder RUN, oldest first."""
    folder = RunFolder(run)
    if not folder.checkpoints.is_dir():
        raise CheckpointError(f"{run} has no folder of checkpoints", hint="give the run_dir of a run")
    removed = _prune(folder, keep_last, keep_every) if prune else []
    best = read_best(folder.checkpoints)
    rows = [_row(c, verify, best is not None and best["iteration"] == c.iteration) for c in _listed(folder)]
    if as_json:
        click.echo(json.dumps({"run_dir": str(run), "checkpoints": rows, "removed": removed}, indent=1))
    else:
        _print(rows, removed)
    return int(any(row["faults"] for row in rows))


def _listed(folder: RunFolder) -> list[Checkpoint]:
    return list_checkpoints(folder.checkpoints)


def _prune(folder: RunFolder, keep_last: int, keep_every: str | None) -> list[str]:
    refuse_if_held(folder.lease)
    try:
        every = None if keep_every is None else parse_count(keep_every)
        if every == 0:
            raise ValueError("0 is no distance between checkpoints")
    except ValueError as error:
        raise ConfigError(f"--keep-every: {error}", hint="for example --keep-every 100M") from error
    best = read_best(folder.checkpoints)
    gone = removable(complete_checkpoints(folder.checkpoints), keep_last, every, best["iteration"] if best else None)
    for path in gone:
        remove_checkpoint(path)
    remove_partials(folder.checkpoints)
    return [str(path) for path in gone]


def _row(checkpoint: Checkpoint, verify: bool, best: bool) -> dict[str, Any]:
    marker = checkpoint.marker
    return {
        "path": str(checkpoint.path),
        "iteration": checkpoint.iteration,
        "complete": marker is not None,
        "consumed_tokens": marker.consumed_tokens if marker else None,
        "bytes": marker.total_bytes if marker else None,
        "created": marker.created if marker else None,
        "layout": marker.layout if marker else None,
        "validation": marker.validation if marker else {},
        "best": best,
        "faults": faults(checkpoint.path, marker) if marker and verify else [],
    }


def _print(rows: list[dict[str, Any]], removed: list[str]) -> None:
    for path in removed:
        click.echo(f"removed {path}")
    if not rows:
        click.echo("no checkpoints")
    for row in rows:
        if not row["complete"]:
            click.echo(f"{row['path']}  incomplete: it has no readable complete.json and is never loaded")
            continue
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in row["validation"].items())
        click.echo(
            f"{row['path']}  {row['consumed_tokens']:,} tokens  {format_bytes(row['bytes'])}  {row['created']}"
            + (f"  {losses}" if losses else "")
            + ("  best" if row["best"] else "")
        )
        for fault in row["faults"]:
            click.echo(f"  damaged: {fault}")
