"""What follows from the end of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.runs.rank_errors import RankError, leave_rank_error, read_rank_errors
from megatron_cpt.slurm.decide import (
    Ending,
    decide,
    ending_of,
    starts_without_progress,
    successors_of,
)

FAILED = RankError("rank 1 failed", None, 1)
USER = RankError("data/x is damaged", "run verify", 2)
HUNG = RankError("no progress in phase 'step'", None, 77)


def last(event: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"iteration": 3, "loss": 1.0}, {"event": event, "iteration": 3, **fields}]


@pytest.mark.parametrize(
    ("code", "asked", "rows", "errors", "kind", "exit_code"),
    [
        (0, "", last("finished"), [], "finished", 0),
        (137, "", last("finished"), [], "finished", 0),  # a rank that was slow to leave
        (75, "USR1", last("stopped", reason="signal SIGUSR1"), [], "restart", 75),
        (75, "", last("stopped", reason="signal SIGTERM"), [], "restart", 75),
        (75, "", last("stopped", reason="the file /runs/a/STOP", by_person=True), [], "stopped", 75),
        (76, "", last("diverged", reason="5 steps in a row skipped"), [], "give_up", 76),
        (143, "", last("killed", reason="the file KILL"), [], "give_up", 76),
        (2, "", [], [], "give_up", 2),
        (76, "", [], [], "give_up", 76),
        (143, "", [], [FAILED, USER], "give_up", 2),  # the peers of the rank that knew why were ended
        (1, "", [], [FAILED], "restart", 1),
        (137, "", [], [], "restart", 137),
        (143, "", [], [FAILED, HUNG], "restart", 77),
        (138, "USR1", [], [], "restart", 75),  # ranks that could not handle the signal yet
    ],
)
def test_the_last_word_comes_before_the_errors_and_both_before_the_exit_code(
    code: int, asked: str, rows: list[dict[str, Any]], errors: list[RankError], kind: str, exit_code: int
) -> None:
    ending = ending_of(code, asked, rows, errors)
    assert (ending.kind, ending.exit_code) == (kind, exit_code)
    assert ending.cause


def test_causes_are_sentences_for_people() -> None:
    assert ending_of(137, "", [], []).cause == "a rank was ended by SIGKILL"
    assert ending_of(1, "", [], [FAILED, HUNG]).cause == "no progress in phase 'step'"
    assert ending_of(75, "USR1", last("stopped", reason="signal SIGUSR1"), []).cause == (
        "saved and stopped after signal SIGUSR1"
    )


RESTART = Ending("restart", "a rank was ended by SIGKILL", 137)


def decided(ending: Ending = RESTART, **facts: Any) -> tuple[str, int]:
    known = {"restarts": 0, "most_restarts": 5, "starts_without_progress": 1, "successors": []}
    decision = decide(ending, **(known | facts))
    return decision.action, decision.exit_code


def test_a_failure_starts_again_until_the_limit_of_restarts() -> None:
    assert decided(restarts=4) == ("requeue", 137)
    assert decided(restarts=5) == ("leave", 76)


def test_starts_that_complete_no_checkpoint_end_before_the_limit() -> None:
    assert decided(starts_without_progress=2)[0] == "requeue"
    assert decided(starts_without_progress=3) == ("leave", 76)


def test_a_queued_successor_continues_instead_of_a_restart() -> None:
    assert decided(successors=["12"])[0] == "hand_over"
    assert decided(successors=["12"], restarts=5)[0] == "hand_over"


@pytest.mark.parametrize("kind", ["finished", "stopped", "give_up"])
def test_nothing_else_starts_again(kind: Any) -> None:
    assert decided(Ending(kind, "why", 2), successors=["12"]) == ("leave", 2)


def test_progress_is_counted_per_job_and_by_complete_checkpoints() -> None:
    events = [
        {"event": "began", "job": "7", "consumed_tokens": 0},
        {"event": "ended", "job": "7"},
        {"event": "began", "job": "8", "consumed_tokens": 100},
        {"event": "began", "job": "8", "consumed_tokens": 200},
        {"event": "began", "job": "8", "consumed_tokens": 200},
    ]
    assert starts_without_progress(events, "8", 200) == 2
    assert starts_without_progress(events, "8", 300) == 0
    assert starts_without_progress(events, "9", 200) == 0  # a person submitted it anew


def test_successors_are_the_queued_jobs_of_the_same_name_that_wait_for_this_one() -> None:
    queue = """12|tiny|afterany:11(unfulfilled)
13|tiny|afterany:12(unfulfilled),afterok:99(unfulfilled)
14|export|afterok:11(unfulfilled)
15|tiny|(null)
16|tiny|singleton(unfulfilled)
111|tiny|afterany:110(unfulfilled)"""  # 14 is another job, which wants the result
    assert successors_of("11", "tiny", queue) == ["12", "13", "16"]
    assert successors_of("14", "export", queue) == []
    assert successors_of("11", "tiny", "") == []


def test_errors_of_ranks_are_read_in_their_order_and_one_that_was_cut_short_is_an_error_too(tmp_path: Path) -> None:
    leave_rank_error(tmp_path / "error_rank_0002.json", USER)
    leave_rank_error(tmp_path / "error_rank_0001.json", FAILED)
    (tmp_path / "error_rank_0003.json").write_text("{")
    assert [error.exit_code for error in read_rank_errors(tmp_path)] == [1, 2, 1]
