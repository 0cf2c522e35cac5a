"""`from megatron_cpt import load_config, run_training` runs the job of the command, wherever it is called from."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
import yaml

from megatron_cpt import load_config, run_training
from megatron_cpt.runs.metrics import read_metrics
from tests.configs import write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


def test_a_run_from_a_thread_of_a_notebook_equals_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread no signal handler may be set, and a notebook's stderr has no file descriptor."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    path = write_tiny_run(tmp_path, budget={"train_tokens": 1024, "warmup_tokens": 0})
    config = load_config(path, ["optimizer.lr=1e-3", "report=true"])
    notebook, codes = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", notebook)
    thread = threading.Thread(target=lambda: codes.append(run_training(config)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "finished: 1,024 tokens" in notebook.getvalue() and "loading Megatron-Core" in notebook.getvalue()
    assert "trained its whole budget" in (tmp_path / "run" / "report.md").read_text()
    assert sum("event" not in row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert resolved["optimizer"]["lr"] == 1e-3
    assert run_training(config) == 0  # it is finished, and says so
