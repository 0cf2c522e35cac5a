"""Signals that ask a rank to stop: at once while it is being set up, at the end of a step once it trains.

One that the user has told the shell to ignore (`nohup`: SIGHUP) stays ignored. Only the main thread may set handlers:
a rank in another thread is stopped by the switch files alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_cpt.runs.exit_codes import STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SETUP_GRACE_SECONDS = 5.0
_WORDS = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGHUP: "the end of the terminal (SIGHUP)"}


def describe_signal(number: int) -> str:
    return _WORDS.get(signal.Signals(number), f"signal {signal.Signals(number).name}")


class StopInSetup(BaseException):
    """A request to stop before the loop runs; not an Exception, so that nothing handles it on the way out."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Call `handler` for every stop signal that is not ignored. Return the handlers before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    signal.set_wakeup_fd(-1)  # a handler of the loop needs no help: it only notes the signal
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def stop_in_setup() -> Iterator[None]:
    """Within it a stop signal raises StopInSetup, until `Control` takes the signals over.

    Python runs a handler when the main thread comes back to Python, which may take half an hour when it waits for other
    ranks: so a thread ends the process when nothing has happened for some seconds.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopInSetup(describe_signal(number))

    before = handle_stop_signals(stop)
    if not before:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()
    threading.Thread(target=_end_if_stuck, args=(reading, over), name="stop in setup", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(-1)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_if_stuck(reading: int, over: threading.Event) -> None:
    """Read the numbers of signals as they arrive; end the process when a stop signal was not followed."""
    with os.fdopen(reading, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] in STOP_SIGNALS and not over.wait(_SETUP_GRACE_SECONDS):
                os._exit(STOPPED)
