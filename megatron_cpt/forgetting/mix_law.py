"""How losses follow from the share of replay, from a few short runs, and the share that keeps within a limit. Pure.

The form is the D-CPT law's (Que et al. 2024, arXiv:2406.01375) at one model and one number of tokens, where its terms
in both are constants: the loss on one kind of text is E + C / (r + epsilon)^gamma, with r that kind's share of the mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_EPSILON = 0.01  # so that a share of 0 has a loss
_GAMMAS = tuple(0.05 * step for step in range(1, 61))
SHARES = tuple(step / 200 for step in range(101))  # of replay that are looked at: 0 to 50 %


@dataclass(frozen=True)
class MixLaw:
    """loss(share) = floor + scale / (share + epsilon)^gamma, nats per token.

    `worst_residual` is the largest distance from a measured loss; three points are always met, so it says little then.
    """

    floor: float
    scale: float
    gamma: float
    worst_residual: float

    def loss(self, share: float) -> float:
        return float(self.floor + self.scale / (share + _EPSILON) ** self.gamma)


def fit(points: Sequence[tuple[float, float]]) -> MixLaw:
    """Fit the law to (share of this kind of text, loss); of all exponents the one with the least squares.

    A loss that does not fall with the share is met by a constant.

    Raises:
        ValueError: fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} points cannot show a curve")
    laws = [law for gamma in _GAMMAS if (law := _with_gamma(points, gamma)).scale > 0]
    return min(laws, key=lambda law: _squares(law, points)) if laws else _constant(points)


def least_share(general: MixLaw, base_loss: float, max_rise: float) -> float | None:
    """The least share of replay at which the rise of general loss is predicted within `max_rise` nats per token."""
    return next((share for share in SHARES if general.loss(share) - base_loss <= max_rise), None)


def _with_gamma(points: Sequence[tuple[float, float]], gamma: float) -> MixLaw:
    """Least squares in floor and scale."""
    xs = [1 / (share + _EPSILON) ** gamma for share, _ in points]
    ys = [loss for _, loss in points]
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    scale = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    law = MixLaw(y_mean - scale * x_mean, scale, gamma, 0.0)
    return MixLaw(law.floor, scale, gamma, max(abs(law.loss(share) - loss) for share, loss in points))


def _constant(points: Sequence[tuple[float, float]]) -> MixLaw:
    mean = math.fsum(loss for _, loss in points) / len(points)
    return MixLaw(mean, 0.0, 1.0, max(abs(mean - loss) for _, loss in points))


def _squares(law: MixLaw, points: Sequence[tuple[float, float]]) -> float:
    return math.fsum((law.loss(share) - loss) ** 2 for share, loss in points)
