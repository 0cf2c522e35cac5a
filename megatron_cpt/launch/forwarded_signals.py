"""Signals to the process that started the ranks: passed on to them, with a word to the user about what happens."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_WORDS = {
    signal.SIGINT: "Ctrl-C: the run saves at the end of this step and stops; the same command continues it. "
    "Press Ctrl-C again to stop at once, without saving",
    signal.SIGHUP: "the terminal was closed (SIGHUP): the run saves at the end of this step and stops; start it with "
    "nohup, or in tmux or screen, to keep it running",
}


class ForwardedSignals:
    """What was asked so far. The handler only notes and passes on; `say_what_happens` logs outside of it."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._unsaid: list[int] = []
        self._interrupts = 0
        self.stopping = False
        self.at_once = False  # Ctrl-C was pressed twice

    def handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self.at_once, self.stopping = self._interrupts > 1, True
        self._unsaid.append(number)
        for process in self._ranks:
            if process.poll() is None:
                process.send_signal(number)

    def say_what_happens(self) -> None:
        while self._unsaid:
            number = signal.Signals(self._unsaid.pop(0))
            if self.at_once:
                logger.warning("Ctrl-C again: stopping at once, without saving")
                self._unsaid.clear()
                return
            text = f"{number.name}: the run saves at the end of this step and stops; the same command continues it"
            logger.warning("%s", _WORDS.get(number, text))


@contextmanager
def forwarded_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[ForwardedSignals]:
    """Pass stop signals on to `ranks` within the block.

    Those that this process was told to ignore (`nohup`) stay ignored. Python allows handlers in the main thread only:
    a run that was started in another thread ends by the switch files, or with this process.
    """
    signals = ForwardedSignals(ranks)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    wanted = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signals.handle) for number in wanted}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
