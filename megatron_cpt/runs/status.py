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
from megatron_cpt.runs.metrics import latest_rows, read_rows
from megatron_cpt.runs.rank_errors import read_rank_error
from megatron_cpt.runs.views import checkpoint_json

# the run's own last word in metrics.jsonl -> its state
_LAST_WORDS = {"finished": "finished", "stopped": "stopped", "killed": "killed", "diverged": "diverged"}


@dataclass(frozen=True)
class RunStatus:
    run_dir: str
    job_name: str
    state: str  # not_started, running, finished, stopped, killed, diverged, failed, interrupted
    iteration: int
    consumed_tokens: int
    train_tokens: int
    loss: float | None
    validation_loss: dict[str, float | None]
    tokens_per_second: float | None
    eta_seconds: float | None
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
    events = sorted((row for row in rows if row.get("event") in _LAST_WORDS), key=lambda row: row["time"])
    checkpoints = list_checkpoints(folder.checkpoints)
    saved = [(checkpoint.path, checkpoint.marker) for checkpoint in checkpoints if checkpoint.marker is not None]
    last = max(steps, key=lambda row: (row["start"], row["iteration"]), default=None)
    error = _last_error(folder)
    last_time = max((row["time"] for row in rows), default=None)
    return RunStatus(
        run_dir=str(root),
        job_name=config.job_name,
        state=_state(folder, events, error, last_time),
        iteration=last["iteration"] if last else 0,
        consumed_tokens=last["consumed_tokens"] if last else 0,
        train_tokens=config.steps(last["consumed_tokens"] if last else 0).train_tokens,
        loss=_number(last["loss"]) if last else None,
        validation_loss={row["name"]: _number(row["loss"]) for row in rows if row.get("event") == "validation"},
        tokens_per_second=last["tokens_per_second"] if last else None,
        eta_seconds=last["eta_seconds"] if last else None,
        last_checkpoint=checkpoint_json(*saved[-1]) if saved else None,
        starts=count_attempts(folder),
        unusable_checkpoints=[c.problem.message for c in checkpoints if c.problem is not None],
        steps_done_twice=sum("event" not in row for row in written) - len(steps),
        skipped_steps=sum(bool(row["skipped"]) for row in steps),
        last_error=error["message"] if error else None,
        last_row_seconds_ago=round(time.time() - last_time, 1) if last_time else None,
    )


def _state(
    folder: RunFolder, events: list[dict[str, Any]], error: dict[str, Any] | None, last_time: float | None
) -> str:
    if _is_running(folder):
        return "running"
    said = events[-1] if events else None
    if error is not None and (said is None or error["time"] >= said["time"]):
        return "failed"
    if said is not None and last_time is not None and said["time"] >= last_time - 1:
        return _LAST_WORDS[said["event"]]
    return "not_started" if last_time is None else "interrupted"


def _is_running(folder: RunFolder) -> bool:
    holder = read_lease(folder.lease)
    if holder is None:
        return False
    alive = is_alive_here(holder)
    if alive is not None:
        return alive
    return time.time() - folder.lease.stat().st_mtime < 6 * HEARTBEAT_SECONDS


def _last_error(folder: RunFolder) -> dict[str, Any] | None:
    """The newest error that a rank of the latest start left, with the time of its file."""
    paths = sorted(folder.logs.glob("error_rank_*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        return None
    return {**asdict(read_rank_error(paths[-1])), "time": paths[-1].stat().st_mtime}


def _number(value: Any) -> float | None:
    """None for what is written as text because JSON has no word for it: NaN and infinity."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
