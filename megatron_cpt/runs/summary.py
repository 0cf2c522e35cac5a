"""A run in one line, from the end of its metrics: what a list of many long runs can afford to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.runs.folder import RunFolder, read_resolved
from megatron_cpt.runs.metrics import finite, last_rows
from megatron_cpt.runs.state import activity, last_error, run_state


@dataclass(frozen=True)
class RunSummary:
    """What `read_status` says of a run, less what takes a look at all of its rows."""

    run_dir: str
    job_name: str
    state: str
    activity: str | None  # of a running one
    iteration: int
    consumed_tokens: int
    train_tokens: int
    loss: float | None
    tokens_per_second: float | None  # of a running one
    eta_seconds: float | None  # of a running one, as of its last row
    updated: float | None  # seconds since 1970 of the last row
    last_error: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_summary(root: Path) -> RunSummary:
    """Return the summary of the run in `root`.

    Raises:
        CheckpointError: `root` is not a run folder.
        ConfigError: its resolved.yaml is not a config of this version.
    """
    folder = RunFolder(root)
    config = read_resolved(folder)
    rows = last_rows(folder.metrics)
    last_row = rows[-1] if rows else None
    step = next((row for row in reversed(rows) if "event" not in row), None) or {}
    error = last_error(folder)
    state = run_state(folder, last_row, error)
    running = state == "running"
    consumed = int((step or last_row or {}).get("consumed_tokens") or 0)
    trained = consumed >= config.budget.train_tokens
    return RunSummary(
        run_dir=str(root),
        job_name=config.job_name,
        state=state,
        activity=activity(folder, last_row, budget_is_trained=trained) if running else None,
        iteration=int((step or last_row or {}).get("iteration") or 0),
        consumed_tokens=consumed,
        train_tokens=config.steps(consumed).train_tokens,
        loss=finite(step.get("loss")),
        tokens_per_second=finite(step.get("tokens_per_second")) if running else None,
        eta_seconds=finite(step.get("eta_seconds")) if running else None,
        updated=finite(last_row.get("time")) if last_row else None,
        last_error=error if state == "failed" else None,
    )
