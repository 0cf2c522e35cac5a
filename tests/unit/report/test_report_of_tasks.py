"""The report shows what tasks said before and after, with intervals and the one test."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from megatron_cpt.report.facts import read_facts
from megatron_cpt.report.write import write_report
from megatron_cpt.runs.task_results import Estimate, TaskResults, TaskRow, task_results_path, write_task_results
from tests.tiny_runs import step, write_run

TESTED = TaskRow(
    "terms<b>", "acc", 50, True, True, Estimate(0.76, 0.626, 0.857), Estimate(0.6, 0.462, 0.724),
    Estimate(0.16, 0.011, 0.297), 0.0386, "McNemar exact", "better",
)  # fmt: skip
SHOWN = dataclasses.replace(TESTED, metric="acc_norm", is_primary=False, verdict=None)


def _written(run: Path, *rows: TaskRow, day: int = 1) -> None:
    when = datetime.datetime(2026, 1, day, tzinfo=datetime.UTC)
    write_task_results(task_results_path(run, when), TaskResults("m", "b", {"seq_length": 256}, rows))


def test_tasks_stand_in_the_verdict_and_in_a_table_with_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    _written(run, TESTED, SHOWN)
    assert "terms<b>: acc 0.6 to 0.76, better (p = 0.0386, McNemar exact)" in read_facts(run).verdict
    page, markdown, _ = (path.read_bytes() for path in write_report([run], tmp_path / "report"))
    assert page.count(b"<td>terms&lt;b&gt;</td>") == 2
    assert page.count(b"better (p = 0.0386, McNemar exact)") == 2  # in the verdict and in the row that was tested
    for text in (b"0.760 [0.626, 0.857]", b"0.600 [0.462, 0.724]", b"+0.160 [+0.011, +0.297]"):
        assert page.count(text) == markdown.count(text) == 2


def test_a_model_that_was_measured_alone_has_no_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    alone = dataclasses.replace(TESTED, before=None, difference=None, p_value=None, verdict=None)
    _written(run, TESTED)
    _written(run, alone, day=2)
    facts = read_facts(run)
    assert facts.tasks == (alone,)
    assert "nothing was measured before and after" in facts.verdict
    assert b"0.760 [0.626, 0.857]" in write_report([run], tmp_path / "report")[0].read_bytes()
