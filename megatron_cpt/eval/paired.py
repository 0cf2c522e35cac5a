"""Whether two models differ on the same items, and by how much: estimates with 95 % intervals, and one paired test.

Values that are 0 or 1 are counted: McNemar's exact test looks only at the items on which the two disagree (McNemar
1947), a proportion has Wilson's score interval, and the difference of two paired proportions Newcombe's (1998, method
10). Any other metric has percentile intervals of a bootstrap over items (Efron 1979), each with both of its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_cpt.runs.task_results import Estimate

Aggregate = Callable[[list[Any]], float]  # a metric of many items from its values of each

SIGNIFICANCE = 0.05
_Z = 1.959963984540054  # of a two-sided 95 % interval
_RESAMPLES = 10_000
_RESAMPLES_OF_FUNCTIONS = 1_000  # where Python computes each one


@dataclass(frozen=True)
class Difference:
    """After less before, with its 95 % interval and the p-value of "there is none"."""

    estimate: Estimate
    p_value: float
    test: Literal["McNemar exact", "paired bootstrap"]
    better: int  # items on which only the second model is right, or is better
    worse: int

    @property
    def is_distinguishable(self) -> bool:
        return self.p_value < SIGNIFICANCE


def estimate(values: Sequence[Any], aggregate: Aggregate | None = None, seed: int = 0) -> Estimate:
    """Return the metric of items with these `values`.

    Args:
        values: at least one; numbers, or whatever `aggregate` takes.
        aggregate: default the mean.
        seed: of the bootstrap.
    """
    if aggregate is None and is_binary(values):
        return _wilson(sum(map(bool, values)), len(values))
    whole = _resampled([list(values)], aggregate, np.arange(len(values))[None])[0][0]
    (drawn,) = _resampled([list(values)], aggregate, _draws(len(values), aggregate, seed))
    return Estimate(float(whole), *_percentiles(drawn))


def difference(
    before: Sequence[Any],
    after: Sequence[Any],
    aggregate: Aggregate | None = None,
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Difference:
    """Compare the values of the same items, in the same order, of two models; see `estimate`."""
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} values are no pairs")
    if aggregate is None and is_binary([*before, *after]):
        rises = sum(1 for old, new in zip(before, after, strict=True) if new > old)
        falls = sum(1 for old, new in zip(before, after, strict=True) if new < old)
        better, worse = (rises, falls) if higher_is_better else (falls, rises)
        return Difference(
            _newcombe(before, after, rises, falls), mcnemar_exact(rises, falls), "McNemar exact", better, worse
        )
    pairs = [list(before), list(after)]
    first, second = _resampled(pairs, aggregate, np.arange(len(before))[None])
    old, new = _resampled(pairs, aggregate, _draws(len(before), aggregate, seed))
    drawn = new - old
    # the smallest interval of the bootstrap that reaches zero, counted with the sample itself
    tail = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = min(1.0, 2 * tail / (len(drawn) + 1))
    rises, falls = _moved(before, after)
    better, worse = (rises, falls) if higher_is_better else (falls, rises)
    value = float(second[0] - first[0])
    return Difference(Estimate(value, *_percentiles(drawn)), p_value, "paired bootstrap", better, worse)


def is_binary(values: Sequence[Any]) -> bool:
    """Whether all values are 0 or 1."""
    return all(isinstance(value, (bool, int, float, np.number)) and value in (0, 1) for value in values)


def mcnemar_exact(rises: int, falls: int) -> float:
    """Return the two-sided p-value of as many changes for the better and the worse, when both are equally likely."""
    changes = rises + falls
    tail = sum(math.comb(changes, k) for k in range(min(rises, falls) + 1))
    return min(1.0, float(2 * tail / 2**changes))


def _wilson(hits: int, n: int) -> Estimate:
    share, z2 = hits / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if hits == 0 else max(0.0, centre - half)  # free of rounding at the ends
    return Estimate(share, low, 1.0 if hits == n else min(1.0, centre + half))


def _newcombe(before: Sequence[Any], after: Sequence[Any], rises: int, falls: int) -> Estimate:
    """Newcombe 1998, Statistics in Medicine 17:2635, method 10: Wilson's intervals, joined with their correlation."""
    n = len(before)
    both = sum(1 for old, new in zip(before, after, strict=True) if old == new == 1)
    neither = n - both - rises - falls
    old, new = _wilson(both + falls, n), _wilson(both + rises, n)
    product = (both + rises) * (neither + falls) * (both + falls) * (neither + rises)
    surplus = both * neither - rises * falls
    correlation = 0.0
    if product:
        corrected = max(0.0, surplus - n / 2) if surplus > 0 else surplus
        correlation = corrected / math.sqrt(product)
    value = new.value - old.value

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    low = value - half(new.value - new.low, old.high - old.value)
    return Estimate(value, max(-1.0, low), min(1.0, value + half(new.high - new.value, old.value - old.low)))


def _draws(n: int, aggregate: Aggregate | None, seed: int) -> np.ndarray:
    resamples = _RESAMPLES if aggregate is None else _RESAMPLES_OF_FUNCTIONS
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def _resampled(columns: Sequence[list[Any]], aggregate: Aggregate | None, draws: np.ndarray) -> list[np.ndarray]:
    """The metric of each column for each row of `draws`, which picks items."""
    if aggregate is None:
        return [np.asarray(column, dtype=float)[draws].mean(axis=1) for column in columns]
    return [np.array([aggregate([column[i] for i in draw]) for draw in draws.tolist()]) for column in columns]


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _moved(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int]:
    """How many items have a larger and a smaller number than before; 0 for values that are no numbers."""
    pairs = list(zip(before, after, strict=True))
    if not all(isinstance(value, (bool, int, float, np.number)) for pair in pairs for value in pair):
        return 0, 0
    return sum(1 for old, new in pairs if new > old), sum(1 for old, new in pairs if new < old)
