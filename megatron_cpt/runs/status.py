"""The state of a run, read from its folder alone: what `megatron-cpt status` shows. No torch; nothing is changed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.runs.checkpoints import list_checkpoints
from megatron_cpt.runs.folder import RunFolder, count_attempts, read_resolved
from megatron_cpt.runs.metrics import Row, finite, latest_rows, read_rows
from megatron_cpt.runs.state import activity, last_error, run_state
from megatron_cpt.runs.views import checkpoint_json


@dataclass(frozen=True)
class RunStatus:
    run_dir: str
    job_name: str
    state: str  # not_started, running, finished, stopped, killed, diverged, failed, interrupted
    activity: str | None  # of a running one: starting, training, validating NAME, saving
    iteration: int
    consumed_tokens: int
    train_tokens: int
    loss: float | None
    validation_loss: dict[str, float | None]
    tokens_per_second: float | None  # of a running one
    eta_seconds: float | None  # of a running one, as of its last row
    last_checkpoint: dict[str, Any] | None  # path, iteration, consumed_tokens, created, bytes
    unusable_checkpoints: list[str]  # why, of each whose marker cannot be understood
    starts: int
    steps_done_twice: int  # lost to restarts: done, not saved, done again
    skipped_steps: int
    last_error: str | None
    last_row_seconds_ago: float | None
    gate: dict[str, Any] | None  # of forgetting.gate, last: perplexity_increases, limit, within, rate_factor

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(root: Path) -> RunStatus:
    """Raises CheckpointError when `root` is not a run folder."""
    folder = RunFolder(root)
    config = read_resolved(folder)
    written, _ = read_rows(folder.metrics)
    rows = latest_rows(written)
    steps = [row for row in rows if "event" not in row]
    checkpoints = list_checkpoints(folder.checkpoints)
    saved = [(checkpoint.path, checkpoint.marker) for checkpoint in checkpoints if checkpoint.marker is not None]
    last = max(steps, key=lambda row: (row["start"], row["iteration"]), default=None)
    error = last_error(folder)
    last_row = written[-1] if written else None
    state = run_state(folder, last_row, error)
    running = state == "running"
    trained = last is not None and last["consumed_tokens"] >= config.budget.train_tokens
    return RunStatus(
        run_dir=str(root),
        job_name=config.job_name,
        state=state,
        activity=activity(folder, last_row, budget_is_trained=trained) if running else None,
        iteration=last["iteration"] if last else 0,
        consumed_tokens=last["consumed_tokens"] if last else 0,
        train_tokens=config.steps(last["consumed_tokens"] if last else 0).train_tokens,
        loss=finite(last["loss"]) if last else None,
        validation_loss={row["name"]: finite(row["loss"]) for row in rows if row.get("event") == "validation"},
        tokens_per_second=last["tokens_per_second"] if last and running else None,
        eta_seconds=last["eta_seconds"] if last and running else None,
        last_checkpoint=checkpoint_json(*saved[-1]) if saved else None,
        starts=count_attempts(folder),
        unusable_checkpoints=[c.problem.message for c in checkpoints if c.problem is not None],
        steps_done_twice=sum("event" not in row for row in written) - len(steps),
        skipped_steps=sum(bool(row["skipped"]) for row in steps),
        last_error=error,
        last_row_seconds_ago=round(max(0.0, time.time() - last_row["time"]), 1) if last_row else None,
        gate=_gate(rows),
    )


def _gate(rows: list[Row]) -> dict[str, Any] | None:
    last = next((row for row in reversed(rows) if row.get("event") == "gate"), None)
    return {key: last[key] for key in ("perplexity_increases", "limit", "within", "rate_factor")} if last else None


def find_runs(root: Path) -> list[Path]:
    """Run folders at or below `root`, newest activity first; the inside of a run is not searched."""
    found: list[Path] = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if RunFolder(folder).resolved.is_file():
            found.append(folder)
        else:
            with contextlib.suppress(OSError):  # it vanished, or may not be read
                waiting += [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=_last_activity, reverse=True)


def _last_activity(run: Path) -> float:
    for path in (RunFolder(run).metrics, RunFolder(run).resolved):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
