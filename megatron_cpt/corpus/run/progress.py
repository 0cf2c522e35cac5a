"""Progress of a run on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_cpt.corpus.run.parts import UnitRecord

log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0


class _Account:
    """Bytes and tokens done, and the rates since the start."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.bytes, self.tokens, self.rejects = total_bytes, 0, 0, 0
        self.started = time.monotonic()

    def add(self, record: UnitRecord) -> None:
        self.bytes += record.size_bytes
        self.tokens += sum(part.tokens for part in record.parts.values())
        self.rejects += sum(record.reject_counts.values())

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = (self.total_bytes - self.bytes) * seconds / max(self.bytes, 1)
        return (
            f"{self.bytes / 1e6:,.0f}/{self.total_bytes / 1e6:,.0f} MB  {self.bytes / 1e6 / seconds:,.1f} MB/s  "
            f"{self.tokens / 1e6:,.1f} M tokens  {self.tokens / 1e6 / seconds:,.2f} M tokens/s  "
            f"{self.rejects:,} rejects  {int(left // 60)}:{int(left % 60):02d} left"
        )


@contextmanager
def progress_view() -> Iterator[Callable[[int], Callable[[UnitRecord], None]]]:
    """Gives `start(total_bytes)`, which gives the function to call with each finished unit."""
    if not sys.stderr.isatty():
        yield _start_lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        TextColumn("preprocess"), BarColumn(), TextColumn("{task.fields[line]}"), console=Console(stderr=True)
    ) as bar:

        def start(total_bytes: int) -> Callable[[UnitRecord], None]:
            account = _Account(total_bytes)
            task = bar.add_task("preprocess", total=max(total_bytes, 1), line="")

            def update(record: UnitRecord) -> None:
                account.add(record)
                bar.update(task, completed=account.bytes, line=account.line())

            return update

        yield start


def _start_lines(total_bytes: int) -> Callable[[UnitRecord], None]:
    account = _Account(total_bytes)
    last = account.started

    def update(record: UnitRecord) -> None:
        nonlocal last
        account.add(record)
        if (now := time.monotonic()) - last >= LOG_EVERY_SECONDS or account.bytes == total_bytes:
            last = now
            log.info("preprocess %s", account.line())

    return update
