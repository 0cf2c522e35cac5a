"""Bytes done, rate and time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)
LOG_SECONDS = 10.0


class Progress:
    """Context manager; `advance(bytes)` may be called from any thread."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total, self._done = label, total_bytes, 0
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            self._bar = RichProgress(TextColumn("{task.description}"), *columns, console=console)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._log(time.monotonic())

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._bar is not None:
                self._bar.advance(self._task, count)
            elif now - self._last >= LOG_SECONDS:
                self._last = now
                self._log(now)

    def _log(self, now: float) -> None:
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        log.info(
            "%s: %.2f of %.2f GB (%d %%), %.2f GB/s, %d s left",
            self._label,
            self._done / 1e9,
            self._total / 1e9,
            100 * self._done // max(self._total, 1),
            rate / 1e9,
            left,
        )
