"""Writes the tiny models that the rows train: `models.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.rows import BASELINES, LOGITS, ROWS
from tests.parity.tiny_models import save_tiny_model

if __name__ == "__main__":
    wanted = {row.model for row in (*BASELINES, *LOGITS, *(gpu.row for gpu in ROWS))}
    for name in sorted(wanted):
        save_tiny_model(name, Path(sys.argv[1]))
