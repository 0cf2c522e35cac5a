"""`megatron-cpt eval tasks` as a user calls it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_cpt.cli import cli
from megatron_cpt.errors import UserError
from megatron_cpt.eval.settings import settings_of_run
from megatron_cpt.runs.task_results import newest_task_rows, read_task_results
from tests.tiny_runs import write_run
from tests.unit.eval.conftest import write_tokenizer
from tests.unit.eval.test_task_files import TASK, write_task

pytest.importorskip("lm_eval", reason="needs lm-eval: make setup, or pip install 'megatron-cpt[tasks]'")

_watched: list[str] = []
_watching = False


def _note_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        _watched.append(f"{event} {arguments!r}")


sys.addaudithook(_note_connections)


@pytest.fixture
def connections() -> Iterator[list[str]]:
    """What Python is asked to connect to meanwhile."""
    global _watching  # noqa: PLW0603  # an audit hook cannot be taken away
    _watched.clear()
    _watching = True
    yield _watched
    _watching = False


def _tasks(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["eval", "tasks", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def base(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before: other weights, the same tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir)).save_pretrained(path)
    shutil.copy(model_dir / "tokenizer.json", path)
    return path


def test_before_and_after_are_asked_the_same_and_no_connection_is_opened(
    model_dir: Path, base: Path, tmp_path: Path, connections: list[str]
) -> None:
    path, output = write_task(tmp_path), tmp_path / "out.json"
    told = json.loads(_tasks(model_dir, "--base", base, "--tasks", path, "--output", output, "--limit", 5, "--json"))
    assert connections == []
    assert told["file"] == str(output)
    results = read_task_results(output)
    assert results is not None
    first, second = results.rows
    assert (first.name, first.items, first.is_primary) == ("mine: acc", 5, True)
    assert first.before is not None
    assert first.verdict == "not distinguishable at n = 5"
    assert second.verdict is None
    values = results.values["mine: acc"]
    assert sum(values["after"]) / 5 == first.after.value
    assert sum(values["before"]) / 5 == first.before.value
    swapped = json.loads(_tasks(base, "--base", model_dir, "--tasks", path, "--limit", 5, "--json"))
    assert swapped["values"]["mine: acc"] == {"before": values["after"], "after": values["before"]}
    assert swapped["file"] is None


def test_the_hook_that_watches_connections_sees_one(connections: list[str]) -> None:
    import socket

    with socket.socket() as probe, pytest.raises(OSError):
        probe.connect(("127.0.0.1", 1))
    assert len(connections) == 1


def test_a_table_with_intervals_says_what_was_tested_and_what_was_cut(model_dir: Path, tmp_path: Path) -> None:
    long = {"question": "the cat sat " * 20, "choices": [" a", " b"], "answer": 0}
    path = write_task(tmp_path, items=[long] * 3)
    told = _tasks(model_dir, "--base", model_dir, "--tasks", path, "--primary", "mine:acc_norm")
    assert "mine: acc_norm, named beforehand: not distinguishable at n = 3" in told
    assert "mine: 3 items are longer than 64 tokens" in told


def test_a_measurement_of_a_run_lies_in_its_folder_and_the_newest_counts(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "eval"
    folder.mkdir(parents=True)
    rows = {name: {"task": name, "metric": "acc", "items": 9, "higher_is_better": True, "is_primary": True,
                   "after": {"value": 0.5, "low": 0.2, "high": 0.8}} for name in ("one", "two")}  # fmt: skip
    for stamp, names, value in (("1", ["one", "two"], 0.5), ("2", ["one"], 0.7)):
        told = [rows[name] | {"after": {"value": value, "low": 0.2, "high": 0.8}} for name in names]
        text = json.dumps({"format": 1, "model": "m", "base": None, "conditions": {}, "rows": told})
        (folder / f"tasks_{stamp}.json").write_text(text)
    (folder / "tasks_3.json").write_text('{"format": 1')
    assert [(row.task, row.after.value) for row in newest_task_rows(tmp_path / "run")] == [("one", 0.7), ("two", 0.5)]


def test_an_export_below_its_run_is_measured_as_the_run_trained_and_noted_there(
    model_dir: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    export = shutil.copytree(model_dir, run / "export" / "hf")
    told = json.loads(_tasks(export, "--tasks", write_task(tmp_path), "--json"))
    assert Path(told["file"]).parent == run / "eval"
    assert told["conditions"]["seq_length"] == min(64, settings_of_run(run / "resolved.yaml").seq_length)
    assert [row.task for row in newest_task_rows(run)] == ["mine", "mine"]


def test_base_and_model_of_different_tokenizers_are_refused(model_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    write_tokenizer(other, extra="zz")
    with pytest.raises(UserError, match="different tokenizers"):
        _tasks(model_dir, "--base", other, "--tasks", write_task(tmp_path))


def test_a_metric_that_is_not_measured_cannot_be_tested(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'mine:acc'"):
        _tasks(model_dir, "--tasks", write_task(tmp_path), "--primary", "mine:ac")


def test_layouts_are_of_megatron_core(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layouts of Megatron-Core"):
        _tasks(model_dir, "--tasks", write_task(tmp_path), "--tp", 2)


def test_generated_and_rolling_tasks_are_measured_too(model_dir: Path, tmp_path: Path) -> None:
    common = {key: TASK[key] for key in ("dataset_path", "dataset_kwargs", "test_split")}
    generated = common | {
        "task": "said", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}", "generation_kwargs": {"until": ["x"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    rolling = common | {
        "task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    paths = [write_task(tmp_path / task["task"], task) for task in (generated, rolling)]
    told = json.loads(_tasks(model_dir, "--tasks", paths[0], "--tasks", paths[1], "--json"))
    said, text = told["rows"]
    assert (said["metric"], said["items"]) == ("exact_match", 6)
    nats = sum(pair[0] for pair in told["values"]["text: bits_per_byte"]["after"])
    size = sum(pair[1] for pair in told["values"]["text: bits_per_byte"]["after"])
    assert text["after"]["value"] == pytest.approx(-nats / size / 0.6931471805599453)
    assert text["after"]["low"] <= text["after"]["value"] <= text["after"]["high"]
    assert text["higher_is_better"] is False


def test_the_ranks_of_a_layout_answer_as_transformers_does(model_dir: Path, base: Path, tmp_path: Path) -> None:
    """Two processes, of which the second knows neither the tasks nor the tokenizer."""
    task = {key: TASK[key] for key in ("dataset_path", "dataset_kwargs", "test_split")} | {
        "task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    asked = [model_dir, "--base", base, "--tasks", write_task(tmp_path, task), "--dtype", "fp32", "--json"]
    ranks = json.loads(_tasks(*asked, "--engine", "megatron", "--pp", 2))["values"]["text: bits_per_byte"]
    alone = json.loads(_tasks(*asked))["values"]["text: bits_per_byte"]
    assert alone["before"] != alone["after"]
    for moment in ("before", "after"):
        pairs = zip(ranks[moment], alone[moment], strict=True)
        assert max(abs(one[0] - other[0]) for one, other in pairs) < 1e-3


@pytest.mark.slow
def test_tasks_of_lm_eval_are_known_by_name(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index of all tasks takes seconds to build."""
    with pytest.raises(UserError, match="did you mean 'pubmedqa'"):
        _tasks(model_dir, "--tasks", "pubmedqaa", "--offline")
