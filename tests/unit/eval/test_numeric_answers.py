"""Numbers are compared as numbers, to the digits of the true answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.eval.numeric_answers import is_right


@pytest.mark.parametrize(
    ("said", "true"),
    [
        (" $1,234.50 in all", "1234.5"), ("(12)", "-12"), ("−12.0", "-12"), ("12.5 %", "12.5%"), ("0.125", "12.5%"),
        ("12.5", "12.5%"), ("12.48", "12.5"), ("3.2 million", "3.2 million"), ("3,200,000", "3.2 million"),
        ("3.2", "$3.2 million"), ("The answer is 7.", "7"), ("Yes, it did", "yes"), ("no.", "no"), (".5", "0.5"),
    ],
)  # fmt: skip
def test_one_number_has_many_spellings(said: str, true: str) -> None:
    assert is_right(said, true)


@pytest.mark.parametrize(
    ("said", "true"),
    [
        ("12.4", "12.5"), ("12", "-12"), ("0.0125", "12.5%"), ("1250", "12.5%"), ("320", "3.2 million"), ("", "7"),
        ("seven", "7"), ("yes", "no"), ("", "yes"), ("1234", "1235"), ("8, not 7", "7"),
    ],
)  # fmt: skip
def test_another_number_is_wrong(said: str, true: str) -> None:
    assert not is_right(said, true)


def test_the_shipped_task_is_taken_over_by_a_file_of_four_lines(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: make setup, or pip install 'megatron-cpt[tasks]'")
    from megatron_cpt.eval.task_list import load_tasks

    item = {"context": "Sales | 10 | 12", "question": "By how much did sales grow?", "answer": "20%"}
    (tmp_path / "finqa.jsonl").write_text(json.dumps(item) + "\n")
    file = tmp_path / "finqa.yaml"
    file.write_text("include: numeric_qa\ntask: finqa\ndataset_kwargs: {data_files: {test: finqa.jsonl}}\n")
    (found,) = load_tasks([str(file)], offline=True)
    assert found.metrics == ("numeric_match",)
    (doc,) = found.task.test_docs()
    assert found.task.doc_to_text(doc).endswith("Question: By how much did sales grow?\nAnswer:")
    assert found.task.process_results(doc, ["0.2"]) == {"numeric_match": 1.0}
    assert found.task.process_results(doc, ["12"]) == {"numeric_match": 0.0}
