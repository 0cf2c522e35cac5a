"""Ends a rank that makes no progress, after writing the stacks of all its threads to its log.

A collective that waits for a dead or stuck peer never returns, and no exception tells why. Each phase of the run
has a longest time; when it is over, every rank's watchdog dumps and exits with code 77.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_cpt.config.sections.failure import FailureConfig
from megatron_cpt.runs.exit_codes import HUNG

logger = logging.getLogger(__name__)

LeaveError = Callable[[str, str, int], None]  # message, hint, exit code


def phase_timeouts(config: FailureConfig) -> dict[str, float]:
    """Longest seconds by phase."""
    minutes = {
        "setup": config.setup_timeout_minutes,
        "step": config.step_timeout_minutes,
        "eval": config.eval_timeout_minutes,
        "save": config.save_timeout_minutes,
    }
    return {phase: 60 * value for phase, value in minutes.items()}


class Watchdog:
    """A daemon thread; the rank says which phase it enters. Every entry starts the phase's time anew."""

    def __init__(
        self, timeouts: dict[str, float], leave_error: LeaveError, end: Callable[[int], None] = os._exit
    ) -> None:
        self._timeouts = timeouts
        self._leave_error = leave_error
        self._end = end
        self._phase, self._entered = "setup", time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        self._phase, self._entered = phase, time.monotonic()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` inside, a fresh step afterwards."""
        self.enter(phase)
        yield
        self.enter("step")

    def _watch(self) -> None:
        poll = min(1.0, min(self._timeouts.values()) / 4)
        while True:
            time.sleep(poll)
            phase, entered = self._phase, self._entered
            if time.monotonic() - entered > self._timeouts[phase]:
                self._expire(phase)
                return

    def _expire(self, phase: str) -> None:
        minutes = self._timeouts[phase] / 60
        message = f"no progress in phase {phase!r} for {minutes:g} minutes: a rank is stuck or lost"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is gone must not save the rank
            sys.stderr.write(f"watchdog: {message}; stacks of all threads:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(file=2, all_threads=True)
        self._leave_error(
            message,
            f"RUN/logs has the stacks of every rank; failure.{phase}_timeout_minutes sets the limit; starting again "
            "continues from the newest complete checkpoint",
            HUNG,
        )
        self._end(HUNG)
