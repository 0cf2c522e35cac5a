"""The report says what the rows say, of runs in any state, and its text is text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.cli import cli
from megatron_cpt.report.facts import read_facts
from tests.tiny_runs import step, write_run


def measured(iteration: int, name: str, loss: object, **values: object) -> dict[str, object]:
    return step(iteration, event="validation", name=name, loss=loss, **values)


def finished_rows() -> list[dict[str, object]]:
    return [
        measured(0, "domain", 3.5), measured(0, "general", 3.0),
        *(step(i, step_seconds=36.0, forward_backward_seconds=30.0) for i in range(1, 101)),
        measured(100, "domain", 3.2), measured(100, "general", 3.0), step(100, event="finished"),
    ]  # fmt: skip


def report(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["report", *map(str, words)])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_verdict_names_gain_loss_and_cost(tmp_path: Path) -> None:
    facts = read_facts(write_run(tmp_path / "run", finished_rows()))
    assert facts.verdict == (
        "The run trained its whole budget: 51.2K tokens, perplexity on domain down 25.9% (33.12 to 24.53), "
        "perplexity on general as before (20.09), at 1.0 GPU-hours."
    )
    assert facts.seconds_by_part == {"forward_backward": 3000.0}
    assert facts.incidents == ()


def test_a_restarted_run_counts_each_step_once_and_names_its_incidents(tmp_path: Path) -> None:
    rows = [step(i, step_seconds=1.0) for i in range(1, 61)]
    rows += [step(i, start=2, step_seconds=1.0) for i in range(31, 41)]
    rows += [step(40, start=2, event="skipped", reason="a spike <b>"), step(40, start=2, event="diverged")]
    facts = read_facts(write_run(tmp_path / "run", rows))
    assert facts.status.state == "diverged" and facts.status.steps_done_twice == 10
    assert [incident.event for incident in facts.incidents][:1] == ["restarted"]
    assert {"skipped", "diverged"} <= {incident.event for incident in facts.incidents}
    assert facts.compared.step_hours == pytest.approx(60 / 3600)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [step(1)],
        [measured(0, "domain", "NaN")],
        [step(1, loss="NaN", grad_norm="inf"), measured(1, "domain", 800.0)],
        [{"start": 1, "time": 1.0, "iteration": 0, "consumed_tokens": 0, "event": "start"}],
    ],
    ids=["nothing", "one step", "NaN before", "NaN and a huge loss", "only started"],
)
def test_any_run_gets_a_report_that_says_how_far_it_came(rows: list[dict[str, object]], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows)
    code, said = report(folder)
    assert code == 0, said
    for ending in ("html", "md", "png"):
        assert (folder / f"report.{ending}").stat().st_size > 500
    assert "nothing was measured before and after" in (folder / "report.md").read_text()


def test_several_runs_share_one_page_without_a_script_or_anything_from_outside(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a<script>", finished_rows())
    second = write_run(tmp_path / "b|c", [step(1)])
    code, said = report(first, second, "--output", tmp_path / "out" / "both", "--json")
    assert code == 0, said
    assert json.loads(said) == {"files": [str(tmp_path / "out" / f"both.{ending}") for ending in ("html", "md", "png")]}
    page = (tmp_path / "out" / "both.html").read_text()
    assert "<script" not in page and "a&lt;script&gt;" in page
    assert "src=" not in page.replace("xlink:href", "") and "url(http" not in page
    assert (tmp_path / "out" / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_no_run_is_one_error(tmp_path: Path) -> None:
    code, said = report(tmp_path)
    assert code != 0 and "is not a run folder" in said
    (tmp_path / "file").touch()
    code, said = report(write_run(tmp_path / "run", [step(1)]), "--output", tmp_path / "file" / "x")
    assert code != 0 and "cannot be written" in said
