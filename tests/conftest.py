"""Shared fixtures and options."""

from __future__ import annotations

import hypothesis
import pytest

hypothesis.settings.register_profile("shared_machine", deadline=None)  # no test asserts wall-clock time
hypothesis.settings.load_profile("shared_machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-points", default="6", help="how often test_train_resume kills a rank, over all layouts")
    parser.addoption("--kill-seed", default="0", help="repeat the moments of an earlier run; 0 draws new ones")
