"""Signals that ask a rank to stop: at once while it is being set up, at the end of a step once it trains.

One that the user has told the shell to ignore (`nohup`: SIGHUP) stays ignored. Only the main thread may set handlers:
a rank in another thread is stopped by the switch files alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_WORDS = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGHUP: "the end of the terminal (SIGHUP)"}


def describe_signal(number: int) -> str:
    return _WORDS.get(signal.Signals(number), f"signal {signal.Signals(number).name}")


class StopInSetup(BaseException):
    """A request to stop before the loop runs; not an Exception, so that nothing handles it on the way out."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Call `handler` for every stop signal that is not ignored. Return the handlers before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def stop_in_setup() -> Iterator[None]:
    """Within it a stop signal raises StopInSetup, until `Control` takes the signals over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopInSetup(describe_signal(number))

    before = handle_stop_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
