"""Shared fixtures and options."""

from __future__ import annotations

import signal

import hypothesis
import pytest

hypothesis.settings.register_profile("shared_machine", deadline=None)  # no test asserts wall-clock time
hypothesis.settings.load_profile("shared_machine")


def pytest_configure() -> None:
    """Let programs that tests start meet signals as in a terminal, also under nohup or in a script's background.

    There SIGHUP or SIGINT is ignored, which a child inherits. A handler that does nothing is the same for these tests,
    and a child begins without it.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-points", default="6", help="how often test_train_resume kills a rank, over all layouts")
    parser.addoption("--kill-seed", default="0", help="repeat the moments of an earlier run; 0 draws new ones")
