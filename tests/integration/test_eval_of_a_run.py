"""Evaluating a run, or its checkpoint, gives the number that its own validation gave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.metrics import read_metrics
from tests.configs import tiny_run
from tests.rank_pool import RankPool


def evaluate(model: Path, data: Path, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "megatron_cpt", "eval", "perplexity", str(model), "--data", str(data), "--json"]
    return dict(json.loads(subprocess.run([*words, *options], check=True, capture_output=True, text=True).stdout))


def test_evaluating_a_run_gives_the_number_of_its_validation(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    held_out = inputs / "held_out"
    config = tiny_run(
        inputs,
        run_dir=str(tmp_path / "run"),
        model={"document_attention": True},
        batch={"seq_length": 48, "micro_batch_size": 2},
        budget={"train_tokens": 48 * 8 * 12},
        optimizer={"lr": 5e-3},
        data={"validation": {"held_out": str(held_out)}},
        eval={"tokens": 500},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert pool.run(tmp_path / "run.yaml", ranks=1, log=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    validated = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "validation"]
    ((checkpoint, _),) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    row = evaluate(checkpoint, held_out)
    assert (row["seq_length"], row["document_attention"], row["tokens"]) == (48, True, 500)
    assert row["loss"] == pytest.approx(validated[-1]["loss"], abs=1e-6)
    assert abs(validated[0]["loss"] - validated[-1]["loss"]) > 0.1  # it is the trained model that was measured
    other = evaluate(tmp_path / "run", held_out, "--no-document-attention")
    assert other["tokens"] == 500 and abs(other["loss"] - row["loss"]) > 1e-4  # negative control
