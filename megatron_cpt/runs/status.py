"""The state of a run, read from its folder alone: what `megatron-cpt status` shows. No torch; nothing is changed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.runs.checkpoints import list_checkpoints
from megatron_cpt.runs.folder import RunFolder, count_attempts, read_resolved
from megatron_cpt.runs.lease import HEARTBEAT_SECONDS, is_alive_here, read_lease
from megatron_cpt.runs.metrics import Row, latest_rows, read_rows
from megatron_cpt.runs.rank_errors import read_rank_error
from megatron_cpt.runs.views import checkpoint_json

# the run's own last word in metrics.jsonl -> its state
_LAST_WORDS = {"finished": "finished", "stopped": "stopped", "killed": "killed", "diverged": "diverged"}


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
    error = _last_error(folder)
    last_time = written[-1]["time"] if written else None
    state = _state(folder, written, error)
    running = state == "running"
    trained = last is not None and last["consumed_tokens"] >= config.budget.train_tokens
    return RunStatus(
        run_dir=str(root),
        job_name=config.job_name,
        state=state,
        activity=_activity(written, count_attempts(folder), trained) if running else None,
        iteration=last["iteration"] if last else 0,
        consumed_tokens=last["consumed_tokens"] if last else 0,
        train_tokens=config.steps(last["consumed_tokens"] if last else 0).train_tokens,
        loss=_number(last["loss"]) if last else None,
        validation_loss={row["name"]: _number(row["loss"]) for row in rows if row.get("event") == "validation"},
        tokens_per_second=last["tokens_per_second"] if last and running else None,
        eta_seconds=last["eta_seconds"] if last and running else None,
        last_checkpoint=checkpoint_json(*saved[-1]) if saved else None,
        starts=count_attempts(folder),
        unusable_checkpoints=[c.problem.message for c in checkpoints if c.problem is not None],
        steps_done_twice=sum("event" not in row for row in written) - len(steps),
        skipped_steps=sum(bool(row["skipped"]) for row in steps),
        last_error=error,
        last_row_seconds_ago=round(max(0.0, time.time() - last_time), 1) if last_time else None,
    )


def find_runs(root: Path) -> list[Path]:
    """Run folders at or below `root`, newest activity first; the inside of a run is not searched."""
    found: list[Path] = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if RunFolder(folder).resolved.is_file():
            found.append(folder)
        else:
            waiting += [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=_last_activity, reverse=True)


def _last_activity(run: Path) -> float:
    folder = RunFolder(run)
    newest = folder.metrics if folder.metrics.is_file() else folder.resolved
    return newest.stat().st_mtime


def _state(folder: RunFolder, written: list[Row], error: str | None) -> str:
    """The order of the rows decides, not their times: the clock of a machine may jump."""
    if _is_running(folder):
        return "running"
    last_word = _LAST_WORDS.get(written[-1].get("event", "")) if written else None
    if last_word is not None and written[-1].get("start") == count_attempts(folder):
        return last_word
    if error is not None:
        return "failed"
    return "interrupted" if written else "not_started"


def _activity(written: list[Row], attempt: int, budget_is_trained: bool) -> str:
    """What a running job does now, by its last row."""
    last = written[-1] if written else {}
    if last.get("start") != attempt:
        return "starting"
    if last.get("event") == "validating":
        return f"validating {last.get('name')}"
    return "saving" if budget_is_trained else "training"


def _is_running(folder: RunFolder) -> bool:
    holder = read_lease(folder.lease)
    if holder is None:
        return False
    alive = is_alive_here(holder)
    if alive is not None:
        return alive
    return time.time() - folder.lease.stat().st_mtime < 6 * HEARTBEAT_SECONDS


def _last_error(folder: RunFolder) -> str | None:
    """The newest error that a rank of the latest attempt left; every attempt begins by deleting them."""
    paths = sorted(folder.logs.glob("error_rank_*.json"), key=lambda path: path.stat().st_mtime)
    return read_rank_error(paths[-1]).message if paths else None


def _number(value: Any) -> float | None:
    """None for what is written as text because JSON has no word for it: NaN and infinity."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
