"""Before against after: the exact test, the intervals, and what neither may claim."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cpt.eval.paired import difference, estimate, mcnemar_exact


def _table(both: int, before: int, after: int, neither: int) -> tuple[list[int], list[int]]:
    """Items by who is right."""
    return [1] * (both + before) + [0] * (after + neither), [1] * both + [0] * before + [1] * after + [0] * neither


@pytest.mark.parametrize(("rises", "falls", "p"), [(0, 0, 1.0), (10, 2, 0.0385742), (5, 5, 1.0), (6, 0, 0.03125)])
def test_mcnemar_is_the_exact_binomial_test_of_the_changes(rises: int, falls: int, p: float) -> None:
    assert mcnemar_exact(rises, falls) == pytest.approx(p, abs=1e-6)
    assert mcnemar_exact(falls, rises) == mcnemar_exact(rises, falls)


@pytest.mark.parametrize("shares", [(0.4, 0.1, 0.25), (0.05, 0.3, 0.3), (0.9, 0.02, 0.05)])
def test_the_interval_of_paired_proportions_covers_the_truth_as_often_as_it_says(
    shares: tuple[float, float, float],
) -> None:
    tables = np.random.default_rng(0).multinomial(50, [*shares, 1 - sum(shares)], size=1500)
    truth, covered = shares[2] - shares[1], 0
    for table in tables.tolist():
        found = difference(*_table(*table)).estimate
        covered += found.low <= truth <= found.high
    assert 0.93 < covered / len(tables) < 0.995


def test_the_interval_of_paired_proportions_is_newcombes() -> None:
    second, first = _table(36, 12, 2, 0)
    found = difference(first, second).estimate
    assert (round(found.value, 4), round(found.low, 4), round(found.high, 4)) == (0.2, 0.0569, 0.3404)


def test_ties_and_small_changes_are_not_distinguishable() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 50).tolist()
    same = difference(before, before)
    assert not same.is_distinguishable
    assert same.p_value == 1
    assert same.estimate.low < 0 < same.estimate.high  # fifty items prove no equality
    after = [*before]
    for item in range(3):
        after[item] = 1 - after[item]
    assert not difference(before, after).is_distinguishable


def test_a_large_change_is_distinguishable_and_has_a_direction() -> None:
    before, after = _table(10, 2, 20, 18)
    found = difference(before, after)
    assert found.is_distinguishable
    assert found.estimate.low > 0
    assert (found.better, found.worse) == (20, 2)
    assert (difference(before, after, higher_is_better=False).better) == 2


def test_numbers_are_compared_by_a_bootstrap_of_pairs() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(5, 3, 80)
    steady = (before + 0.2 + rng.normal(0, 0.1, 80)).tolist()
    found = difference(before.tolist(), steady)
    assert found.test == "paired bootstrap"
    assert found.is_distinguishable  # the items differ by far more than the models
    assert found.estimate.low == pytest.approx(0.2, abs=0.05)
    shuffled = rng.permutation(steady).tolist()
    assert not difference(before.tolist(), shuffled).is_distinguishable  # the negative control: pairs torn apart


def test_metrics_of_all_items_together_are_resampled_as_such() -> None:
    def ratio(items: list[tuple[float, int]]) -> float:
        return sum(nats for nats, _ in items) / sum(count for _, count in items)

    before = [(10.0 + i % 7, 4 + i % 3) for i in range(60)]
    after = [(nats * 0.9, count) for nats, count in before]
    assert estimate(before, ratio).value == pytest.approx(ratio(before))
    found = difference(before, after, ratio, higher_is_better=False)
    assert found.estimate.value == pytest.approx(-0.1 * ratio(before))
    assert found.is_distinguishable


def test_one_proportion_has_wilsons_interval() -> None:
    found = estimate([1] * 8 + [0] * 2)
    assert (round(found.low, 3), round(found.high, 3)) == (0.490, 0.943)
    assert estimate([0] * 10).low == 0
    assert estimate([1] * 10).high == 1
