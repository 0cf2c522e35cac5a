"""Run folders as a run leaves them, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.configs import write_tiny_run


def step(iteration: int, *, start: int = 1, time: float = 1e9, **values: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    plain = {
        "start": start, "time": time + iteration, "iteration": iteration, "consumed_tokens": 512 * iteration,
        "loss": 5.0 - iteration / 100, "lr": 1e-5, "grad_norm": 1.0, "skipped": False, "tokens_per_second": 1000.0,
        "eta_seconds": 10.0,
    }  # fmt: skip
    return plain | values


def write_run(folder: Path, rows: Iterable[Mapping[str, Any]] = (), logs: Mapping[str, str] | None = None) -> Path:
    """Write a run folder with these rows. Return it."""
    folder.mkdir(parents=True)
    write_tiny_run(folder, run_dir=str(folder)).rename(folder / "resolved.yaml")
    (folder / "logs").mkdir()
    for name, text in (logs or {}).items():
        (folder / "logs" / name).write_text(text)
    rows = list(rows)
    if rows:
        (folder / "history.jsonl").write_text("{}\n" * max(row.get("start", 1) for row in rows))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
