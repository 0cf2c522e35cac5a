"""`from megatron_cpt import load_config, train` runs the job of the command."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


def test_train_from_python_equals_the_command(tmp_path: Path) -> None:
    import megatron_cpt.launch.preflight  # noqa: F401 - the package being imported must not hide the function
    from megatron_cpt import load_config, train

    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    raw = {
        "job_name": "api",
        "run_dir": str(tmp_path / "run"),
        "model": {"init_from": str(tmp_path / "model"), "check_start": False},
        "budget": {"train_tokens": 1024, "warmup_tokens": 0},
        "batch": {"seq_length": 64, "global_batch_size": 8},
        "precision": {"dtype": "fp32"},
        "data": {"train": [{"name": "data", "prefix": str(tmp_path / "data")}], "max_epochs": 9},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = load_config(path, ["optimizer.lr=1e-3"])
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row and row.get("event") in (None, "step") for row in rows) == 2
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert resolved["optimizer"]["lr"] == 1e-3
