from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tiny conversions would wait minutes for the disk; nothing here has to survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
