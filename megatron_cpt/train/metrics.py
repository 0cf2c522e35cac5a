"""metrics.jsonl, written: what happened, by consumed tokens. Only rank 0 writes; `runs/metrics.py` reads.

A step's row: iteration, consumed_tokens, loss (mean over the step's tokens), loss_by_source, tokens_by_source (read so
far), share_by_source (of the step), scheduled_share_by_source, lr, grad_norm, skipped, global_batch_size, step_seconds
and its parts, tokens_per_second, tokens_per_second_per_gpu, mfu, peak_memory_gib, remaining_tokens, eta_seconds. A
validation's row: event "validation", name, loss, perplexity, tokens. Every row has `start`, the number of the attempt
(launch) of the run that wrote it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cpt.train.trackers import Tracker

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends rows to metrics.jsonl; a line that a crash cut short is closed before the first row."""

    def __init__(self, path: Path, attempt: int, trackers: Sequence[Tracker] = ()) -> None:
        self.attempt = attempt
        self.trackers = list(trackers)
        self._full = False  # the last row could not be written
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, **row: Any) -> None:
        finite = {key: _json_safe(value) for key, value in row.items()}
        try:
            self._file.write(json.dumps({**finite, "start": self.attempt, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()
            self._full = False
        except OSError as error:  # a full disk must not end the run: space may be made
            if not self._full:
                logger.error("metrics.jsonl cannot be written; rows may be delayed or lost: %s", error)
            self._full = True
        for tracker in list(self.trackers):
            self._copy_to(tracker, partial(tracker.write, row))

    def _copy_to(self, tracker: Tracker, work: Callable[[], None]) -> None:
        """A tracker that fails, for want of a network or of space, is dropped; the run goes on."""
        try:
            work()
        except Exception as error:
            logger.error("no more rows for %s: %s; metrics.jsonl has all of them", tracker.name, error)
            self.trackers.remove(tracker)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        for tracker in list(self.trackers):
            self._copy_to(tracker, tracker.close)


def _json_safe(value: Any) -> Any:
    """NaN and infinity are not JSON: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _json_safe(v) for k, v in value.items()} if isinstance(value, dict) else value
