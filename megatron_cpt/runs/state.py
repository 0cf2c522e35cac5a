"""What a run is doing, from its lease, its last row and the errors that its ranks left."""

from __future__ import annotations

import time

from megatron_cpt.runs.folder import RunFolder, count_attempts
from megatron_cpt.runs.lease import HEARTBEAT_SECONDS, is_alive_here, read_lease
from megatron_cpt.runs.metrics import Row
from megatron_cpt.runs.rank_errors import read_rank_error

# the run's own last word in metrics.jsonl -> its state
_LAST_WORDS = {"finished": "finished", "stopped": "stopped", "killed": "killed", "diverged": "diverged"}


def run_state(folder: RunFolder, last_row: Row | None, error: str | None) -> str:
    """Return not_started, running, finished, stopped, killed, diverged, failed or interrupted.

    The order of the rows decides, not their times: the clock of a machine may jump.

    Args:
        folder: of the run.
        last_row: the last of metrics.jsonl, None where there is none.
        error: what `last_error` returned.
    """
    if is_running(folder):
        return "running"
    last_word = _LAST_WORDS.get(last_row.get("event", "")) if last_row else None
    if last_row is not None and last_word is not None and last_row.get("start") == count_attempts(folder):
        return last_word
    if error is not None:
        return "failed"
    return "interrupted" if last_row else "not_started"


def activity(folder: RunFolder, last_row: Row | None, *, budget_is_trained: bool) -> str:
    """Return what a running job does now, by its last row: starting, training, validating NAME or saving."""
    last = last_row or {}
    if last.get("start") != count_attempts(folder):
        return "starting"
    if last.get("event") == "validating":
        return f"validating {last.get('name')}"
    return "saving" if budget_is_trained else "training"


def is_running(folder: RunFolder) -> bool:
    """Return whether a job holds the run's lease; of one that cannot be seen from here the age of its beat decides."""
    holder = read_lease(folder.lease)
    if holder is None:
        return False
    alive = is_alive_here(holder)
    if alive is not None:
        return alive
    try:
        return time.time() - folder.lease.stat().st_mtime < 6 * HEARTBEAT_SECONDS
    except OSError:  # released in this moment
        return False


def last_error(folder: RunFolder) -> str | None:
    """Return the newest error that a rank of the latest attempt left; every attempt begins by deleting them."""
    paths = sorted(folder.logs.glob("error_rank_*.json"), key=lambda path: path.stat().st_mtime)
    return read_rank_error(paths[-1]).message if paths else None
