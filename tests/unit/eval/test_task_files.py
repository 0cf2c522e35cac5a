"""A task file is read strictly: every mistake is one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.errors import UserError

pytest.importorskip("lm_eval", reason="needs lm-eval: make setup, or pip install 'megatron-cpt[tasks]'")

TASK: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ITEMS = [{"question": f"the cat {n}", "choices": [" sat", " dog"], "answer": n % 2} for n in range(6)]


def write_task(folder: Path, task: dict[str, Any] = TASK, items: list[Any] = ITEMS) -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data/items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def test_data_is_found_beside_the_file_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_cpt.eval.task_list import load_tasks

    path = write_task(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found,) = load_tasks([str(path)], offline=True)
    assert (found.name, found.metrics) == ("mine", ("acc", "acc_norm"))
    assert [doc["question"] for doc in found.task.test_docs()] == [item["question"] for item in ITEMS]


def test_a_file_may_take_the_rest_from_another(tmp_path: Path) -> None:
    from megatron_cpt.eval.task_files import read_task_file

    write_task(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("include: mine.yaml\ntask: child\nnum_fewshot: 2\n")
    found = read_task_file(child)
    assert (found["task"], found["num_fewshot"], found["doc_to_text"]) == ("child", 2, "{{question}}")
    (tmp_path / "mine.yaml").write_text("include: child.yaml\n")
    with pytest.raises(UserError, match="circle"):
        read_task_file(child)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_txt": "{{question}}"}, "'doc_to_txt'\nhint: did you mean 'doc_to_text'"),
        ({"output_type": "multiple"}, "output_type is 'multiple'"),
        ({"metric_list": [{"metric": "accc"}]}, "no metric 'accc'\nhint: did you mean 'acc'"),
        ({"metric_list": [{"metric": "acc", "agregation": "mean"}]}, "did you mean 'aggregation'"),
        ({"metric_list": None}, "names no metric"),
        ({"dataset_path": None}, "dataset_path is missing"),
        ({"test_split": "tset"}, "test_split is 'tset', which data_files lacks\nhint: did you mean 'test'"),
        ({"test_split": None}, "which items to ask"),
        ({"dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}, "items.jsonl is not there"),
        ({"dataset_kwargs": {}}, "a file for each split"),
        ({"group": "many"}, "no single task"),
        ({"doc_to_text": "{{quesion}}"}, "quesion"),
    ],
)
def test_a_mistake_in_a_task_file_is_one_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from megatron_cpt.eval.task_list import load_tasks

    path = write_task(tmp_path, {key: value for key, value in (TASK | change).items() if value is not None})
    with pytest.raises(UserError) as caught:
        load_tasks([str(path)], offline=True)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"question": 1}\n{"quest', "line 2"), ("[1]\n", "no JSON object"), ("", "no items"), (b"\xff\xfe", "UTF-8")],
)
def test_data_that_is_no_jsonl_is_one_message(tmp_path: Path, text: str | bytes, message: str) -> None:
    from megatron_cpt.eval.task_list import load_tasks

    path = write_task(tmp_path)
    (tmp_path / "data/items.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_tasks([str(path)], offline=True)


def test_items_of_several_kinds_are_one_message(tmp_path: Path) -> None:
    from megatron_cpt.eval.task_list import load_tasks

    path = write_task(tmp_path, items=[*ITEMS, ITEMS[0] | {"answer": "first"}])
    with pytest.raises(UserError, match="not of one kind"):
        load_tasks([str(path)], offline=True)


@pytest.mark.parametrize("text", ["a: [", "- a\n", "a: !function nothing.here\n"])
def test_a_file_that_is_no_task_is_one_message(tmp_path: Path, text: str) -> None:
    from megatron_cpt.eval.task_files import read_task_file

    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        read_task_file(tmp_path / "x.yaml")
