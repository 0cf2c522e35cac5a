"""Which strength is proposed, and what is tried next, from outcomes that are written down."""

from __future__ import annotations

import pytest

from megatron_cpt.forgetting.trade_off import Outcome, choose, log_scale, next_to_try

PLAIN = Outcome(0, domain_gain=0.2, general_rise=0.1)
WEAK = Outcome(1, domain_gain=0.199, general_rise=0.09)
GOOD = Outcome(10, domain_gain=0.19, general_rise=0.04)
HARD = Outcome(100, domain_gain=0.1, general_rise=0.01)


def test_the_least_general_loss_among_those_that_keep_the_gain() -> None:
    choice = choose([PLAIN, HARD, WEAK, GOOD], keep=0.9)
    assert choice.strength == 10
    assert "keeps 95%" in choice.why and "spares 60%" in choice.why and "largest" not in choice.why
    assert choose([PLAIN, HARD, WEAK, GOOD], keep=0.4).strength == 100
    assert "largest that was tried" in choose([PLAIN, WEAK, GOOD], keep=0.9).why


@pytest.mark.parametrize(
    ("outcomes", "strength", "said"),
    [
        ([Outcome(0, -0.1, 0.1), GOOD], None, "nothing to keep"),
        ([Outcome(0, 0.2, -0.01), GOOD], 0.0, "nothing is forgotten"),
        ([PLAIN, HARD], None, "try smaller ones"),
        ([PLAIN, Outcome(1, 0.2, 0.0999)], None, "spares less than 5%"),
        ([PLAIN, Outcome(1, 0.2, 0.2)], None, "spares less than 5%"),
        ([PLAIN, Outcome(1, float("nan"), 0.0)], None, "try smaller ones"),
    ],
)
def test_no_proposal_where_none_will_do(outcomes: list[Outcome], strength: float | None, said: str) -> None:
    choice = choose(outcomes, keep=0.9)
    assert choice.strength == strength and said in choice.why


def test_the_next_strength_lies_where_the_gain_is_lost() -> None:
    assert next_to_try([PLAIN, WEAK, GOOD, HARD], keep=0.9) == pytest.approx(31.6)
    assert next_to_try([PLAIN, WEAK, GOOD], keep=0.9) is None
    assert next_to_try([PLAIN, HARD], keep=0.9) is None
    assert next_to_try([Outcome(0, -0.1, 0.1), GOOD, HARD], keep=0.9) is None


def test_strengths_have_equal_ratios() -> None:
    assert log_scale(1, 1e4, 5) == [1, 10, 100, 1000, 10000]
    assert log_scale(0.5, 8, 3) == [0.5, 2, 8]
    assert log_scale(3, 100, 1) == [3]


def test_an_outcome_is_the_mean_over_its_sets() -> None:
    first, last = {"a": 3.0, "b": 2.0, "g": 1.0}, {"a": 2.5, "b": 1.7, "g": 1.25}
    assert Outcome.of(2.0, first, last, ["a", "b"], ["g"]) == Outcome(2.0, pytest.approx(0.4), 0.25)
