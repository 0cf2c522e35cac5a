from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.sections.failure import FailureConfig
from megatron_cpt.train.guard import Guard, robust_zscore

CONFIG = FailureConfig()


def seasoned(*losses: float) -> Guard:
    guard = Guard()
    for loss in losses or [3.0 + 0.01 * (i % 7) for i in range(40)]:
        guard = guard.after(CONFIG, loss, refused=False)
    return guard


def test_a_spike_is_refused_and_a_drop_is_not() -> None:
    guard = seasoned()
    assert guard.verdict(CONFIG, 3.1, 1.0) is None
    assert guard.verdict(CONFIG, 0.5, 1.0) is None
    assert "loss spike" in str(guard.verdict(CONFIG, 6.0, 1.0))
    assert guard.verdict(CONFIG.model_copy(update={"spike_zscore": None}), 6.0, 1.0) is None


def test_nothing_is_a_spike_before_enough_steps_or_within_one_percent_of_a_flat_loss() -> None:
    assert seasoned(*[3.0] * 19).verdict(CONFIG, 300.0, 1.0) is None
    assert seasoned(*[3.0] * 20).verdict(CONFIG, 300.0, 1.0) is not None
    assert seasoned(*[3.0] * 40).verdict(CONFIG, 3.2, 1.0) is None


def test_skips_count_in_a_row_and_do_not_enter_the_reference() -> None:
    guard = seasoned()
    for _ in range(CONFIG.skips_before_rollback):
        assert not guard.must_roll_back(CONFIG)
        guard = guard.after(CONFIG, math.nan, refused=True)
    assert guard.must_roll_back(CONFIG)
    assert guard.losses == seasoned().losses
    assert guard.after(CONFIG, 3.0, refused=False).skips_in_row == 0
    assert guard.rolled_back_to(Guard((1.0,))) == Guard((1.0,), 0, 1)


@given(st.lists(st.floats(0.1, 20), max_size=200))
def test_the_window_is_bounded_and_survives_json(losses: list[float]) -> None:
    guard = Guard()
    for loss in losses:
        guard = guard.after(CONFIG, loss, refused=False)
    assert guard.losses == tuple(losses[-CONFIG.spike_window :])
    assert Guard.from_json(guard.to_json()) == guard


def test_zscore_of_a_normal_sample_is_about_its_deviations() -> None:
    reference = tuple(10 + x / 10 for x in range(-50, 51))  # uniform: MAD 2.5
    assert robust_zscore(10 + 3 * 1.4826 * 2.5, reference) == pytest.approx(3.0, rel=0.05)
