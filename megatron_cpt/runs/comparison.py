"""Runs side by side: what each has reached, read from their folders."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.runs.metrics import Row, finite
from megatron_cpt.runs.summary import read_summary


@dataclass(frozen=True)
class ValidationChange:
    """The loss on one validation set, from the first measurement to the last, and the lowest."""

    first: float | None
    last: float | None
    lowest: float | None
    lowest_tokens: int | None  # consumed when it was the lowest


@dataclass(frozen=True)
class ComparedRun:
    """One column of a comparison."""

    name: str
    run_dir: str
    state: str
    consumed_tokens: int
    train_tokens: int
    loss: float | None  # of the last step
    tokens_per_second: float | None  # median over its steps
    step_hours: float  # of all steps that count
    validation: dict[str, ValidationChange]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def validation_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the measurements of each validation set, in order of tokens."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("event") == "validation":
            found.setdefault(str(row["name"]), []).append(row)
    return found


def compared_run(root: Path, rows: Sequence[Row]) -> ComparedRun:
    """Return what the run in `root` has reached; `rows` are those of its metrics that count.

    Raises:
        CheckpointError: it is not a run folder.
        ConfigError: its resolved.yaml is not a config of this version.
    """
    summary = read_summary(root)
    steps = [row for row in rows if "event" not in row]
    rates = [rate for row in steps if (rate := finite(row.get("tokens_per_second"))) is not None]
    return ComparedRun(
        name=summary.job_name,
        run_dir=str(root),
        state=summary.state,
        consumed_tokens=summary.consumed_tokens,
        train_tokens=summary.train_tokens,
        loss=summary.loss,
        tokens_per_second=statistics.median(rates) if rates else None,
        step_hours=sum(finite(row.get("step_seconds")) or 0.0 for row in steps) / 3600,
        validation=validation_changes(rows),
    )


def validation_changes(rows: Sequence[Row]) -> dict[str, ValidationChange]:
    """Return what happened to the loss on each validation set."""
    return {name: _change(measured) for name, measured in validation_rows(rows).items()}


def _change(measured: list[Row]) -> ValidationChange:
    known = [(loss, int(row["consumed_tokens"])) for row in measured if (loss := finite(row["loss"])) is not None]
    lowest = min(known, default=None)
    return ValidationChange(
        first=finite(measured[0]["loss"]),
        last=finite(measured[-1]["loss"]),
        lowest=None if lowest is None else lowest[0],
        lowest_tokens=None if lowest is None else lowest[1],
    )
