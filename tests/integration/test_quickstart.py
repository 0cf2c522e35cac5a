"""The tiny quickstart through the real commands, as `make quickstart SIZE=tiny` runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".quickstart" / "tiny"
STEPS = 13


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _quickstart() -> subprocess.CompletedProcess[str]:
    done = _run(sys.executable, "examples/quickstart/quickstart.py", "--size", "tiny")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def _cpt(*words: object) -> str:
    done = _run(sys.executable, "-m", "megatron_cpt", *map(str, words))
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def first_run() -> subprocess.CompletedProcess[str]:
    """A run from nothing, but for the downloads; what it made stays for the other tests."""
    shutil.rmtree(WORK, ignore_errors=True)
    return _quickstart()


@pytest.fixture(scope="module")
def report(first_run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads((WORK / "report.json").read_text())


def test_every_step_ran_and_its_command_was_shown(first_run: subprocess.CompletedProcess[str]) -> None:
    assert first_run.stderr.count("\n  $ ") == STEPS
    assert "skipped" not in first_run.stderr
    assert "tok/s" in first_run.stderr  # training shows its progress
    for title in ("Perplexity on held-out documents", "Cost", "Now your own corpus"):
        assert title in first_run.stdout


def test_the_model_learnt_the_domain(report: dict[str, Any]) -> None:
    domain, general = report["perplexity"]["domain"], report["perplexity"]["general"]
    assert 40_000 < domain["before"] < 60_000  # random weights: about the size of the vocabulary
    assert domain["after"] < domain["before"] / 10
    assert domain["after"] < general["after"]  # it is the domain that was trained on
    assert domain["tokens"] > 5_000 and general["tokens"] > 5_000


def test_datasets_are_sound_and_held_out_documents_were_not_trained_on(report: dict[str, Any]) -> None:
    import numpy as np

    for name in ("medical_train", "medical_valid", "general_train", "general_valid"):
        _cpt("verify", WORK / "data" / name)
    from megatron_cpt.corpus.dataset.indexed import open_indexed

    parts = {part: list(open_indexed(WORK / "data" / f"medical_{part}")) for part in ("train", "valid")}
    trained = {np.asarray(document).tobytes() for document in parts["train"]}
    assert len(parts["train"]) > 10_000 and len(parts["valid"]) > 100
    assert not [document for document in parts["valid"] if np.asarray(document).tobytes() in trained]


def test_export_opens_with_transformers_and_is_the_trained_model(report: dict[str, Any]) -> None:
    """Three measurements of one model: the loop at PP2, Megatron-Core at PP1, transformers on the export."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_cpt.runs.metrics import read_metrics

    model = AutoModelForCausalLM.from_pretrained(WORK / "export")
    tokenizer = AutoTokenizer.from_pretrained(WORK / "export")
    with torch.no_grad():
        logits = model(**tokenizer("Hypoplasia of the", return_tensors="pt")).logits
    assert logits.shape[-1] == model.config.vocab_size and torch.isfinite(logits).all()

    rows = [row for row in read_metrics(WORK / "run" / "metrics.jsonl") if row.get("event") == "validation"]
    in_loop = [row for row in rows if row["name"] == "domain"]
    data = WORK / "data" / "medical_valid"
    one_process = json.loads(_cpt("eval", "perplexity", WORK / "run", "--data", data, "--seq-length", "256", "--json"))
    exported = next(
        row
        for row in json.loads((WORK / "results" / "after.json").read_text())["results"]
        if row["data"].endswith("medical_valid")
    )
    assert one_process["tokens"] == in_loop[-1]["tokens"] == exported["tokens"]
    assert one_process["loss"] == pytest.approx(in_loop[-1]["loss"], abs=1e-6)
    assert exported["loss"] == pytest.approx(in_loop[-1]["loss"], abs=2e-3)  # bfloat16, other kernels
    assert abs(in_loop[-1]["loss"] - in_loop[-2]["loss"]) > 0.02  # negative control: half trained is far outside


def test_tasks_were_put_to_both_models_and_stand_in_the_report(report: dict[str, Any]) -> None:
    items = {name: (WORK / "tasks" / f"{name}.jsonl").read_text() for name in ("hpo_terms", "factbook_next")}
    assert [text.count("\n") for text in items.values()] == [100, 100]
    rows = report["tasks"]["rows"]
    assert [f"{row['task']}: {row['metric']}" for row in rows if row["is_primary"]] == ["hpo_terms: acc"]
    assert all(row["before"]["low"] <= row["before"]["value"] <= row["before"]["high"] for row in rows)
    assert "hpo_terms: acc" in (WORK / "run" / "report.md").read_text()


def test_the_second_run_skips_every_finished_step(first_run: subprocess.CompletedProcess[str]) -> None:
    checkpoints = sorted((WORK / "run" / "checkpoints").rglob("*.distcp"))
    written = [path.stat().st_mtime_ns for path in checkpoints]
    second = _quickstart()
    assert second.stderr.count("skipped") == STEPS
    assert checkpoints and [path.stat().st_mtime_ns for path in checkpoints] == written


def test_a_lost_export_is_made_again_without_training(first_run: subprocess.CompletedProcess[str]) -> None:
    weights = WORK / "export" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(WORK / "export")
    again = _quickstart()
    assert again.stderr.count("skipped") == STEPS - 1
    assert weights.read_bytes() == before


def test_nothing_the_quickstart_makes_is_tracked() -> None:
    status = _run("git", "check-ignore", ".quickstart/tiny/model/model.safetensors", ".quickstart/downloads/x.whl")
    assert len(status.stdout.splitlines()) == 2
