"""Whether starting again can help: an error before the first step, in two attempts in a row, would come a third time.

RUN/logs/failure_rank_XXXX.json holds the attempt in which a rank failed last, and whether the run had come forward.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FAILED
from megatron_cpt.runs.folder import RunFolder, count_attempts
from megatron_cpt.runs.lease import is_superseded
from megatron_cpt.runs.metrics import read_rows

START_AGAIN = "start the same command again: it continues from the newest complete checkpoint"


def advise_after_failure(folder: RunFolder | None, rank: int) -> tuple[str, int]:
    """Return the hint to give and the exit code when `rank` has failed; note the failure for the next attempt.

    Without a run folder (None) no attempt was recorded, and nothing is noted.
    """
    if folder is None or not folder.logs.is_dir():
        return "correct what the log says before it is started again", FAILED
    if is_superseded(folder.lease):  # the attempts are counted by a later start now
        return "this start was cut off, and its job continues elsewhere", FAILED
    attempt, note = count_attempts(folder), folder.logs / f"failure_rank_{rank:04d}.json"
    before = _read(note)
    stuck = not _has_trained(folder, attempt)
    with contextlib.suppress(OSError):  # a full disk: then the next failure counts as the first
        note.write_text(json.dumps({"attempt": attempt, "stuck": stuck}), encoding="utf-8")
    if stuck and before == (attempt - 1, True):
        return (
            f"attempts {attempt - 1} and {attempt} both failed before a step was trained: correct what {folder.logs} "
            "says before it is started again",
            DO_NOT_RESTART,
        )
    return START_AGAIN, FAILED


def _has_trained(folder: RunFolder, attempt: int) -> bool:
    """Whether a step of this attempt is in metrics.jsonl."""
    return any(row.get("start") == attempt and "loss" in row for row in read_rows(folder.metrics)[0])


def _read(note: Path) -> tuple[int, bool] | None:
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        return int(told["attempt"]), bool(told["stuck"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
