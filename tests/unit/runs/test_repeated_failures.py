"""An error that would come again is not answered with "start the same command again"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FAILED
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.repeated_failures import START_AGAIN, advise_after_failure


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    made.logs.mkdir()
    return made


def begin_attempt(folder: RunFolder, *, trained_steps: int = 0) -> None:
    with folder.history.open("a") as file:
        file.write("{}\n")
    attempt = len(folder.history.read_text().splitlines())
    rows = [{"event": "start", "start": attempt}]
    rows += [{"iteration": step, "loss": 2.0, "start": attempt} for step in range(trained_steps)]
    with folder.metrics.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_second_failure_in_a_row_before_a_step_is_not_to_be_repeated(folder: RunFolder) -> None:
    begin_attempt(folder)
    assert advise_after_failure(folder, 0) == (START_AGAIN, FAILED)
    begin_attempt(folder)
    hint, code = advise_after_failure(folder, 0)
    assert code == DO_NOT_RESTART
    assert "attempts 1 and 2" in hint and "start the same command" not in hint
    begin_attempt(folder)
    assert advise_after_failure(folder, 0)[1] == DO_NOT_RESTART


@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (1, 1)])
def test_an_attempt_that_trained_may_be_repeated(folder: RunFolder, steps: tuple[int, int]) -> None:
    for trained in steps:
        begin_attempt(folder, trained_steps=trained)
        advice = advise_after_failure(folder, 0)
    assert advice == (START_AGAIN, FAILED)


def test_attempts_between_that_did_not_fail_break_the_row(folder: RunFolder) -> None:
    begin_attempt(folder)
    advise_after_failure(folder, 0)
    begin_attempt(folder)  # stopped on request before its first step
    begin_attempt(folder)
    assert advise_after_failure(folder, 0) == (START_AGAIN, FAILED)


def test_ranks_are_counted_apart(folder: RunFolder) -> None:
    begin_attempt(folder)
    advise_after_failure(folder, 0)
    begin_attempt(folder)
    assert advise_after_failure(folder, 1) == (START_AGAIN, FAILED)


@pytest.mark.parametrize("text", ["", "[]", '{"attempt": 1}', '{"attempt": "x", "stuck": true}', "null"])
def test_a_damaged_note_counts_for_nothing(folder: RunFolder, text: str) -> None:
    (folder.logs / "failure_rank_0000.json").write_text(text)
    begin_attempt(folder)
    begin_attempt(folder)
    assert advise_after_failure(folder, 0) == (START_AGAIN, FAILED)


def test_before_there_is_a_run_folder_nothing_is_promised(tmp_path: Path) -> None:
    for folder in (None, RunFolder(tmp_path / "absent")):
        hint, code = advise_after_failure(folder, 0)
        assert code == FAILED and "start the same command again" not in hint
    assert not (tmp_path / "absent").exists()
