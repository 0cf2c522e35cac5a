"""Token arithmetic is exact: parsing, intervals, steps."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.budget import BatchSize, Interval, cut_budget, format_count, parse_count


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
     ("1.5B tokens", Interval(1_500_000_000, "tokens")), ("163_840 tokens", Interval(163_840, "tokens")),
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


def stepwise(requested: int, size: BatchSize, seq_length: int, position: int) -> tuple[int, int]:
    """The same count by taking every step: (steps, tokens at the end)."""
    steps = 0
    while position < requested:
        steps, position = steps + 1, position + size.at(position) * seq_length
    return steps, position


SIZES = st.one_of(
    st.builds(BatchSize, st.integers(1, 40)),
    st.builds(lambda first, levels, tokens: BatchSize(first * levels, first, tokens), st.integers(1, 6),
              st.integers(1, 9), st.integers(1, 20_000)),
    st.builds(BatchSize, st.integers(1, 40), st.integers(1, 60), st.integers(0, 20_000)),  # also ramps that are refused
)  # fmt: skip


@given(st.integers(1, 30_000), SIZES, st.integers(1, 16), st.integers(0, 30_000))
def test_the_cut_equals_taking_every_step(requested: int, size: BatchSize, seq_length: int, consumed: int) -> None:
    steps = cut_budget(requested, size, seq_length, consumed)
    assert (steps.train_iters, steps.train_tokens) == stepwise(requested, size, seq_length, consumed)
    if steps.train_iters:
        assert 0 <= steps.added_tokens < steps.last_step_tokens


@given(st.integers(1, 30_000), SIZES, st.integers(1, 16), st.integers(0, 20))
def test_the_end_is_the_same_from_every_position_of_the_run(
    requested: int, size: BatchSize, seq_length: int, steps_done: int
) -> None:
    position = 0
    for _ in range(steps_done):
        if position < requested:
            position += size.at(position) * seq_length
    whole, rest = cut_budget(requested, size, seq_length), cut_budget(requested, size, seq_length, position)
    assert rest.train_tokens == whole.train_tokens


def test_the_recipe_table_is_fifty_iterations() -> None:
    assert cut_budget(1_638_400, BatchSize(32), 1024).train_iters == 50


@pytest.mark.parametrize("size", [BatchSize(3), BatchSize(12, 3, 2000)], ids=["constant", "ramp"])
def test_exact_rounding_names_both_neighbours_and_accepts_them(size: BatchSize) -> None:
    steps = cut_budget(4_321, size, 100)
    assert steps.broken_rule("up") is None
    broken = steps.broken_rule("exact")
    assert broken is not None
    below, above = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", broken[1])[:2])
    assert below < 4_321 < above == steps.train_tokens
    for legal in (below, above):
        assert cut_budget(legal, size, 100).broken_rule("exact") is None


@pytest.mark.parametrize("size", [BatchSize(3), BatchSize(12, 3, 2000)], ids=["constant", "ramp"])
def test_a_budget_below_the_first_step_is_refused_and_one_of_a_step_is_not(size: BatchSize) -> None:
    for too_small in (0, 1, 299):
        broken = cut_budget(too_small, size, 100).broken_rule("up")
        assert broken is not None
        assert "smaller than one step of 300" in broken[0]
    assert cut_budget(300, size, 100).broken_rule("exact") is None


def test_after_a_change_of_the_batch_the_run_ends_with_the_first_whole_step_behind_the_budget() -> None:
    """1,792 tokens in steps of 256, then steps of 384 to a budget of 2,048: one step, not those from token 0."""
    assert cut_budget(2_048, BatchSize(6), 64, consumed_tokens=1_792).train_tokens == 2_176
    assert cut_budget(2_048, BatchSize(6), 64, consumed_tokens=2_304).train_iters == 0
