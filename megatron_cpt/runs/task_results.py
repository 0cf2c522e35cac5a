"""RUN/eval/tasks_*.json: what downstream tasks said of a model, and of its base on the same items.

Written by `eval tasks`, read by the report, the model card and the page. No file is overwritten: of each task the
newest one counts.
"""

from __future__ import annotations

import datetime
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpt.durable import write_output

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task: of the base (`before`) where it was measured, and of the model (`after`)."""

    task: str
    metric: str
    items: int
    higher_is_better: bool
    is_primary: bool  # the one metric that was named before the measurement: only it is tested
    after: Estimate
    before: Estimate | None = None
    difference: Estimate | None = None
    p_value: float | None = None
    test: str | None = None
    verdict: str | None = None  # in words, of the primary metric
    iteration: int | None = None  # of the run's checkpoint that was measured

    @property
    def name(self) -> str:
        return f"{self.task}: {self.metric}"

    @property
    def conclusion(self) -> str:
        """The answer of the test in words, empty for a metric that is not tested."""
        if not self.verdict or self.p_value is None:
            return ""
        return f"{self.verdict} (p = {self.p_value:.3g}, {self.test})"


@dataclass(frozen=True)
class TaskResults:
    """One measurement."""

    model: str
    base: str | None
    conditions: dict[str, Any]  # engine, layout, dtype, seq_length, limit: the same for both models
    rows: tuple[TaskRow, ...]
    truncated_items: dict[str, int] = field(default_factory=dict)  # longer than the sequence, by task
    values: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # of each item: "task: metric", before/after
    seconds: dict[str, float] = field(default_factory=dict)
    written: str = ""  # UTC
    version: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def task_sentence(row: TaskRow) -> str:
    """What a tested metric did, as a part of a sentence; empty for one that is not tested."""
    if not row.conclusion or row.before is None:
        return ""
    return f"{row.name} {row.before.value:.3g} to {row.after.value:.3g}, {row.conclusion}"


def shown_estimate(found: Estimate | None, *, sign: bool = False) -> str:
    """Return a value with its interval, `0.520 [0.385, 0.652]`; nothing for None."""
    if found is None:
        return ""
    form = ("+" if sign else "") + (".3f" if abs(found.value) < 1000 else ",.4g")
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def task_results_path(run: Path, now: datetime.datetime | None = None) -> Path:
    """Return where a measurement that ends `now` is written in the folder of a run."""
    when = now or datetime.datetime.now(datetime.UTC)
    return run / "eval" / f"tasks_{when:%Y%m%dT%H%M%S}.json"


def write_task_results(path: Path, results: TaskResults) -> None:
    """Write one measurement.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(results.to_json(), indent=1, ensure_ascii=False)
    write_output(path, (text + "\n").encode(), hint="--output names another file")


def read_task_results(path: Path) -> TaskResults | None:
    """Return one measurement, None (and a warning) for a file of another format."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.pop("format") != FORMAT:
            raise ValueError("of another version")
        return TaskResults(rows=tuple(map(_row, told.pop("rows"))), **told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is passed over: %s", path, error)
        return None


def _row(told: dict[str, Any]) -> TaskRow:
    for key in ("before", "after", "difference"):
        if told.get(key) is not None:
            told[key] = Estimate(**told[key])
    return TaskRow(**told)


def task_measurements(run: Path) -> list[TaskResults]:
    """Return the measurements in a run's folder, the oldest first."""
    found = [read_task_results(path) for path in sorted((run / "eval").glob("tasks_*.json"))]
    return sorted((results for results in found if results is not None), key=lambda results: results.written)


def newest_task_rows(run: Path) -> list[TaskRow]:
    """Return the rows of each task's newest measurement, in the order in which the tasks were first measured."""
    by_task: dict[str, list[TaskRow]] = {}
    for results in task_measurements(run):
        rows: dict[str, list[TaskRow]] = {}
        for row in results.rows:
            rows.setdefault(row.task, []).append(row)
        by_task |= rows
    return [row for rows in by_task.values() for row in rows]
