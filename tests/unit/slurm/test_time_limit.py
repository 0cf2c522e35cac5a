"""Time limits in Slurm's forms, and the notice a save needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm.time_limit import (
    check_time_limit,
    format_time_limit,
    notice_seconds,
    parse_time_limit,
    save_seconds,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("12:00:00", 43_200),
        ("1-0", 86_400),
        ("2-03:04", 183_840),
        ("7-00:00:00", 604_800),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_every_form_of_slurm_is_read(text: str, seconds: int | None) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "two hours", "1:2:3:4", "-5", "12:00:00h", "1.5"])
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(LaunchError, match="is not a time limit"):
        parse_time_limit(text)


@given(st.integers(0, 10**7))
def test_what_is_written_is_read_back(seconds: int) -> None:
    assert parse_time_limit(format_time_limit(seconds)) == seconds


def test_a_save_is_estimated_from_its_size_until_one_was_measured() -> None:
    assert save_seconds(8 * 2**30, nodes=4) == 2.0
    rows = [
        {"event": "save", "iteration": 4, "blocked_seconds": 3.0, "time": 100.0},
        {"iteration": 5, "loss": 1.0, "time": 105.0},
        {"event": "saved", "iteration": 6, "checkpoint_iteration": 4, "time": 140.0},
        {"event": "save", "iteration": 8, "blocked_seconds": 1.0, "time": 200.0},
        {"event": "saved", "iteration": 9, "checkpoint_iteration": 8, "time": 203.0},
    ]
    assert save_seconds(8 * 2**30, nodes=4, rows=rows) == 43.0


def test_the_notice_covers_two_saves_and_a_step() -> None:
    assert notice_seconds(0.1) == 120
    assert notice_seconds(240) == 540
    assert notice_seconds(241) == 600


def test_a_limit_shorter_than_one_save_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(LaunchError, match=r"0-00:09:00, shorter than a start and one save") as caught:
        check_time_limit(540, 540, "the time limit")
    least = (caught.value.hint or "").split("--time=")[1].split()[0]
    check_time_limit(parse_time_limit(least), 540, "the time limit")
    check_time_limit(None, 540, "the time limit")
