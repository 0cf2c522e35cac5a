"""Stop signals while a rank is set up: an exception at once, or the end of a process that waits outside of Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_cpt.train.stop_signals import StopInSetup, describe_signal, handle_stop_signals, stop_in_setup


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_in_setup_raises_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopInSetup, match=number.name), stop_in_setup():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_rank_that_waits_outside_of_python_ends_all_the_same() -> None:
    """The main thread waits for a lock in C, where Python's handlers do not run, as in a collective."""
    script = (
        "import ctypes\n"
        "from megatron_cpt.train import stop_signals\n"
        "stop_signals._SETUP_GRACE_SECONDS = 0.2\n"
        "lock, libc = (ctypes.c_char * 64)(), ctypes.CDLL(None)\n"
        "with stop_signals.stop_in_setup():\n"
        "    print('waiting', flush=True)\n"
        "    libc.pthread_mutex_lock(lock)\n"
        "    libc.pthread_mutex_lock(lock)\n"  # waits for ever
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    while not _waits(process.pid):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def _waits(pid: int) -> bool:
    """Whether the main thread of a process sleeps each of ten times that it is looked at."""
    for _ in range(10):
        time.sleep(0.01)
        if Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            return False
    return True


def test_in_another_thread_no_handler_is_set() -> None:
    found: list[object] = []

    def run() -> None:
        with stop_in_setup():
            found.append(handle_stop_signals(lambda number, frame: None))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [{}]


def test_signals_are_described_as_a_person_knows_them() -> None:
    assert describe_signal(signal.SIGINT) == "Ctrl-C (SIGINT)"
    assert describe_signal(signal.SIGTERM) == "signal SIGTERM"
