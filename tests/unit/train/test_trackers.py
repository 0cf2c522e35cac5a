from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.train import trackers
from megatron_cpt.train.metrics import MetricsFile

STEP = {"iteration": 3, "consumed_tokens": 300, "loss": 2.5, "loss_by_source": {"a": 2.0, "b": 3.0}, "mfu": None}


def make(**log: Any) -> RunConfig:
    return build_config({"job_name": "t", "model": {"init_from": "m"}, "log": log})


def test_rows_become_scalars_by_consumed_tokens(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    closed: list[str] = []
    copy = trackers.Tracker("copy", lambda row: seen.append(trackers.scalars(row)), lambda: closed.append("copy"))
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 1, [copy])
    metrics.write(**STEP)
    metrics.write(event="validation", name="held_out", iteration=3, consumed_tokens=300, loss=2.0, perplexity=7.4)
    metrics.write(event="saved", iteration=3, consumed_tokens=300)
    assert seen == [
        {"iteration": 3, "consumed_tokens": 300, "loss": 2.5, "loss_by_source/a": 2.0, "loss_by_source/b": 3.0},
        {"validation/held_out/loss": 2.0, "validation/held_out/perplexity": 7.4},
        {},
    ]
    metrics.close()
    assert closed == ["copy"]


def test_a_tracker_that_fails_is_dropped_and_the_rows_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def offline(row: dict[str, Any]) -> None:
        raise OSError("no route to host")

    metrics = MetricsFile(tmp_path / "metrics.jsonl", 1, [trackers.Tracker("W", offline, lambda: None)])
    metrics.write(**STEP)
    metrics.write(**STEP)
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("no more rows for W: no route to host") == 1


def test_a_tracker_that_cannot_be_opened_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**kwargs: Any) -> None:
        raise OSError("no space left on device")

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert trackers.open_trackers(make(wandb_project="cpt"), RunFolder(tmp_path)) == []
    assert "no rows for Weights & Biases: no space left on device" in caplog.text


def test_wandb_goes_on_with_the_same_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

        def log(self, row: dict[str, Any]) -> None:
            calls.append(row)

        def finish(self) -> None:
            calls.append("finished")

    fake = ModuleType("wandb")
    fake.init = lambda **kwargs: calls.append(kwargs) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tracker,) = trackers.open_trackers(make(wandb_project="cpt"), RunFolder(tmp_path))
    tracker.write(STEP)
    tracker.close()
    started, metric, row, finished = calls
    assert finished == "finished"
    assert {"id": "t", "resume": "allow", "mode": "offline", "project": "cpt"}.items() <= started.items()
    assert metric == (("*",), {"step_metric": "consumed_tokens"})
    assert row["loss"] == 2.5 and row["consumed_tokens"] == 300
