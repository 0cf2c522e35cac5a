"""Shared fixtures and options."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-points", default="6", help="how often test_train_resume kills a rank, over all layouts")
    parser.addoption("--kill-seed", default="0", help="repeat the moments of an earlier run; 0 draws new ones")
