"""From the values of single items to the rows of a result: metrics with intervals, groups, and the one test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_cpt.config.problems import near_match
from megatron_cpt.errors import ConfigError, CptError
from megatron_cpt.eval.paired import Aggregate, Difference, difference, estimate
from megatron_cpt.eval.task_list import NamedTask
from megatron_cpt.runs.task_results import TaskRow

Key = tuple[str, str]  # task or group, metric
Values = dict[Key, list[Any]]  # one value an item; a metric may carry the filter of its answers: "exact_match,strict"


@dataclass(frozen=True)
class _Metric:
    """How the values of items become one number."""

    aggregate: Aggregate | None  # None: their mean
    higher_is_better: bool


def find_primary(tasks: Sequence[NamedTask], named: str | None) -> Key:
    """Return the task or group and the metric that is tested: `named` as "task:metric" or "task", else the first.

    Raises:
        ConfigError: there is no such task or metric.
    """
    known = [*_with_groups(tasks)]
    if named is None:
        return known[0]
    task_name, _, metric = named.partition(":")
    for key in known:
        if key[0] == task_name and metric in ("", key[1]):
            return key
    written = [":".join(key) for key in known]
    near = near_match(named, written)
    raise ConfigError(
        f"--primary: {named!r} is measured by none of the tasks",
        hint=f"did you mean {near!r}?" if near else f"there are: {', '.join(written[:10])}",
    )


def task_rows(
    tasks: Sequence[NamedTask], primary: Key, before: Mapping[Key, list[Any]] | None, after: Mapping[Key, list[Any]]
) -> list[TaskRow]:
    """Return a row for each metric of each task, and before those of a group the rows of all its items together.

    Args:
        tasks: what was measured.
        primary: the task or group and the metric that is tested.
        before: values of the base's items, where it was measured.
        after: values of the model's items.

    Raises:
        CptError: a metric is NaN or infinite.
    """
    rows: list[TaskRow] = []
    for (name, metric), (how, members) in _with_groups(tasks).items():
        filtered = dict.fromkeys(key[1] for key in after if key[0] == members[0] and bare(key[1]) == metric)
        for written in filtered:
            keys = [(member, written) for member in members]
            new = [value for key in keys for value in after[key]]
            old = None if before is None else [value for key in keys for value in before[key]]
            is_primary = (name, metric) == primary and not any(row.is_primary for row in rows)
            rows.append(_row(name, written, how, old, new, is_primary=is_primary))
    return rows


def bare(metric: str) -> str:
    """A metric without the filter that its answers went through."""
    return metric.partition(",")[0]


def _with_groups(tasks: Sequence[NamedTask]) -> dict[Key, tuple[_Metric, list[str]]]:
    """Each metric of each group and task in the order of the rows, with the tasks whose items it is of."""
    found: dict[Key, tuple[_Metric, list[str]]] = {}
    for named in tasks:
        if named.group is not None:
            members = [other for other in tasks if other.group == named.group]
            for metric in named.metrics:
                hows = [_metric(other.task, metric) for other in members if metric in other.metrics]
                if len(hows) == len(members) and all(how == replace(hows[0], aggregate=None) for how in hows):
                    found.setdefault((named.group, metric), (hows[0], [other.name for other in members]))
        for metric in named.metrics:
            found[named.name, metric] = (_metric(named.task, metric), [named.name])
    return found


def _metric(task: Any, metric: str) -> _Metric:
    function = task.aggregation()[metric]
    is_mean = getattr(function, "__name__", "") == "mean"
    return _Metric(None if is_mean else function, bool(task.higher_is_better().get(metric, True)))


def _row(
    name: str, metric: str, how: _Metric, before: list[Any] | None, after: list[Any], *, is_primary: bool
) -> TaskRow:
    measured = estimate(after, how.aggregate)
    if not math.isfinite(measured.value):
        raise CptError(f"{metric} of {name} is {measured.value}", hint="are the weights of the model finite?")
    row = TaskRow(name, metric, len(after), how.higher_is_better, is_primary, measured)
    if before is None:
        return row
    changed = difference(before, after, how.aggregate, higher_is_better=how.higher_is_better)
    return replace(
        row,
        before=estimate(before, how.aggregate),
        difference=changed.estimate,
        p_value=changed.p_value,
        test=changed.test,
        verdict=_verdict(changed, len(after), how) if is_primary else None,
    )


def _verdict(changed: Difference, items: int, how: _Metric) -> str:
    if not changed.is_distinguishable:
        return f"not distinguishable at n = {items}"
    return "better" if (changed.estimate.value > 0) == how.higher_is_better else "worse"
