"""Token arithmetic is exact: parsing, intervals, steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.budget import Interval, format_count, parse_count, plan_steps
from megatron_cpt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5B", 1_500_000_000), ("163_840", 163_840), ("1,638,400", 1_638_400), ("100M", 10**8), ("2k", 2000),
     ("0.001T", 10**9), (7, 7), (2e6, 2_000_000), ("1.638400M", 1_638_400)],
)  # fmt: skip
def test_counts_are_read_exactly(text: str | int | float, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "1.5Q", "-3", -3, "1.2345K", 0.5, True, "tokens", "1e6", "1..5B"])
def test_what_is_no_count_is_refused(text: str | int | float) -> None:
    with pytest.raises(ValueError):
        parse_count(text)


@given(st.integers(0, 10**15))
def test_formatting_never_changes_a_count(count: int) -> None:
    assert parse_count(format_count(count)) == count


@pytest.mark.parametrize(
    ("text", "interval"),
    [("100M tokens", Interval(10**8, "tokens")), ("1000 iters", Interval(1000, "iters")),
     ("1.5B", Interval(1_500_000_000, "tokens")), (163_840, Interval(163_840, "tokens")),
     ("1 iteration", Interval(1, "iters")), ("20 steps", Interval(20, "iters"))],
)  # fmt: skip
def test_intervals(text: str | int, interval: Interval) -> None:
    assert Interval.parse(text) == interval
    assert Interval.parse(str(interval)) == interval


@pytest.mark.parametrize("text", ["0", "0 iters", "5 miles", "tokens"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Interval.parse(text)


@given(st.integers(1, 5000), st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_a_token_interval_is_due_once_per_multiple_crossed(count: int, steps: list[int]) -> None:
    """Whatever the step sizes, the steps that are due are those that reach a new multiple."""
    every, position, due = Interval(count, "tokens"), 0, 0
    for i, step in enumerate(steps, 1):
        due += every.due(before_tokens=position, after_tokens=position + step, iteration=i)
        position += step
    crossed = {p // count for p in _positions(steps)} - {0}
    assert due == len(crossed)


def _positions(steps: list[int]) -> list[int]:
    total, out = 0, []
    for step in steps:
        total += step
        out.append(total)
    return out


def test_the_recipe_table_is_fifty_iterations() -> None:
    assert plan_steps(1_638_400, 32 * 1024).train_iters == 50


@given(st.integers(1, 10**13), st.integers(1, 10**8))
def test_steps_cover_the_budget_with_less_than_one_step_to_spare(train_tokens: int, tokens_per_step: int) -> None:
    if train_tokens < tokens_per_step:
        with pytest.raises(ConfigError, match="smaller than one step"):
            plan_steps(train_tokens, tokens_per_step)
        return
    steps = plan_steps(train_tokens, tokens_per_step)
    assert 0 <= steps.added_tokens < tokens_per_step
    assert steps.train_tokens == steps.train_iters * tokens_per_step


def test_exact_rounding_names_both_neighbours() -> None:
    with pytest.raises(ConfigError) as error:
        plan_steps(1000, 300, "exact")
    assert "900 or 1,200" in (error.value.hint or "")
