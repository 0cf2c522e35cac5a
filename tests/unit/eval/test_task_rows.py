"""Rows of tasks and groups: what is pooled, and what is tested."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.errors import UserError
from megatron_cpt.eval.task_list import NamedTask
from megatron_cpt.eval.task_rows import find_primary, task_rows


def mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))


def total(values: list[Any]) -> float:
    return float(sum(values))


class _Task:
    """As much of lm-eval's task as rows are made of."""

    def __init__(self, **aggregations: Any) -> None:
        self._aggregations = aggregations

    def aggregation(self) -> dict[str, Any]:
        return self._aggregations

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "loss" for name in self._aggregations}


def _named(name: str, group: str | None = None, **aggregations: Any) -> NamedTask:
    return NamedTask(name, _Task(**aggregations), tuple(aggregations), group)


GROUP = [_named("a", "law", acc=mean, f1=total), _named("b", "law", acc=mean, f1=total)]
BEFORE = {("a", "acc"): [0, 0, 1], ("a", "f1"): [1, 2, 3], ("b", "acc"): [0] * 9, ("b", "f1"): [1] * 9}
AFTER = BEFORE | {("b", "acc"): [1] * 9}


def test_the_items_of_a_group_are_pooled_where_the_metric_is_a_mean() -> None:
    rows = task_rows(GROUP, find_primary(GROUP, None), BEFORE, AFTER)
    assert [row.name for row in rows] == ["law: acc", "a: acc", "a: f1", "b: acc", "b: f1"]
    law = rows[0]
    assert law.before is not None
    assert (law.items, law.before.value, law.after.value) == (12, 1 / 12, 10 / 12)
    assert (law.is_primary, law.verdict, law.test) == (True, "better", "McNemar exact")
    assert [row.verdict for row in rows[1:]] == [None] * 4


def test_a_group_of_different_metrics_is_not_pooled() -> None:
    tasks = [GROUP[0], _named("b", "law", loss=mean)]
    assert find_primary(tasks, None) == ("a", "acc")
    rows = task_rows(tasks, ("b", "loss"), None, {("a", "acc"): [1], ("a", "f1"): [2], ("b", "loss"): [3.0]})
    assert [(row.name, row.is_primary) for row in rows] == [("a: acc", False), ("a: f1", False), ("b: loss", True)]


def test_lower_may_be_better() -> None:
    tasks = [_named("t", loss=mean)]
    (row,) = task_rows(tasks, ("t", "loss"), {("t", "loss"): [3.0] * 20}, {("t", "loss"): [2.0] * 20})
    assert row.verdict == "better"
    (row,) = task_rows(tasks, ("t", "loss"), {("t", "loss"): [2.0] * 20}, {("t", "loss"): [3.0] * 20})
    assert row.verdict == "worse"


def test_each_filter_of_a_metric_has_its_row_and_the_first_is_tested() -> None:
    tasks = [_named("t", exact_match=mean)]
    values: dict[tuple[str, str], list[Any]] = {("t", "exact_match,strict"): [0, 1], ("t", "exact_match,loose"): [1, 1]}
    rows = task_rows(tasks, ("t", "exact_match"), values, values)
    assert [(row.metric, row.is_primary) for row in rows] == [
        ("exact_match,strict", True),
        ("exact_match,loose", False),
    ]


def test_primary_is_named_by_task_or_task_and_metric() -> None:
    assert find_primary(GROUP, "b") == ("b", "acc")
    assert find_primary(GROUP, "b:f1") == ("b", "f1")
    assert find_primary(GROUP, "law:acc") == ("law", "acc")
    with pytest.raises(UserError, match="did you mean 'law:acc'"):
        find_primary(GROUP, "law:acccc")
