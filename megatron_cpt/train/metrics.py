"""metrics.jsonl and the console: what happened, by consumed tokens. Only rank 0 writes.

A step's row: iteration, consumed_tokens, loss (mean over the step's tokens), loss_by_source, lr, grad_norm,
skipped, global_batch_size, step_seconds and its parts, tokens_per_second, tokens_per_second_per_gpu, mfu,
peak_memory_gib, remaining_tokens, eta_seconds. A validation's row: event "validation", name, loss, perplexity,
tokens. Every row has `start`, the number of the start of the run that wrote it: after a crash some steps are done
twice, and the row of the later start counts (`read_metrics`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_cpt.budget import format_count
from megatron_cpt.launch.local import CONSOLE_FD
from megatron_cpt.train.trackers import Tracker

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends rows to metrics.jsonl; a line that a crash cut short is closed before the first row."""

    def __init__(self, path: Path, start: int, trackers: Sequence[Tracker] = ()) -> None:
        self.start = start
        self.trackers = list(trackers)
        self._full = False  # the last row could not be written
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, **row: Any) -> None:
        finite = {key: _json_safe(value) for key, value in row.items()}
        try:
            self._file.write(json.dumps({**finite, "start": self.start, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()
            self._full = False
        except OSError as error:  # a full disk must not end the run: space may be made
            if not self._full:
                logger.error("rows of metrics.jsonl are late or lost: %s", error)
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows in order of iteration, torn lines left out, and of steps that were done twice the later ones."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        latest[(row.get("event"), row.get("name"), row.get("iteration"))] = row
    return sorted(latest.values(), key=lambda row: row.get("iteration") or 0)


def open_console() -> TextIO:
    """The user's terminal: handed down by `megatron-cpt train`, else this process's stderr."""
    descriptor = os.environ.get(CONSOLE_FD)
    return os.fdopen(int(descriptor), "w", closefd=False) if descriptor else sys.stderr


class ConsoleView:
    """A progress bar on a terminal, one line per logged step elsewhere."""

    def __init__(self, stream: TextIO, train_tokens: int, consumed_tokens: int) -> None:
        self.stream = stream
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[tokens]} tokens"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=RichConsole(file=stream),
            )
            self._task = self._bar.add_task(
                "", total=train_tokens, completed=consumed_tokens, tokens=format_count(consumed_tokens)
            )
            self._bar.start()

    def step(self, row: dict[str, Any], train_iters: int, train_tokens: int) -> None:
        text = (
            f"iter {row['iteration']}/{train_iters}  loss {row['loss']:.4f}  lr {row['lr']:.3g}  "
            f"grad {row['grad_norm']:.3g}  {row['tokens_per_second']:,.0f} tok/s"
        )
        consumed = row["consumed_tokens"]
        if self._bar is not None:
            shown = f"{consumed:,}/{train_tokens:,}"
            self._bar.update(self._task, completed=consumed, description=text, tokens=shown)
        else:
            eta = time.strftime("%H:%M:%S", time.gmtime(row["eta_seconds"]))
            self.line(f"{text}  {consumed:,}/{train_tokens:,} tokens  left {eta}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class ConsoleHandler(logging.Handler):
    """This project's log records, shown above the progress bar."""

    def __init__(self, view: ConsoleView) -> None:
        super().__init__(logging.INFO)
        self.view = view

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname} "
        self.view.line(prefix + record.getMessage())
