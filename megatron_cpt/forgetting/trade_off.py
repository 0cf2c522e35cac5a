"""What a setting keeps of the domain's gain and costs in general text: how one of several is chosen. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST_SPARED = 0.05  # of the rise of general loss: below it a setting does nothing that could be told from chance


@dataclass(frozen=True)
class Outcome:
    """One strength of a method, measured."""

    strength: float  # 0: without the method
    domain_gain: float  # nats per token, the mean over the domain's sets; more is better
    general_rise: float  # likewise of the general sets; less is better

    @classmethod
    def of(
        cls,
        strength: float,
        first: Mapping[str, float],
        last: Mapping[str, float],
        domain: Sequence[str],
        general: Sequence[str],
    ) -> Outcome:
        """From the losses of the sets before and after."""
        gain = math.fsum(first[name] - last[name] for name in domain) / len(domain)
        rise = math.fsum(last[name] - first[name] for name in general) / len(general)
        return cls(strength, gain, rise)

    def kept(self, plain: Outcome) -> float:
        """The share of the gain without the method; meaningless where that is not positive."""
        return self.domain_gain / plain.domain_gain

    def spared(self, plain: Outcome) -> float:
        """The share of the rise without the method that does not happen; likewise."""
        return 1 - self.general_rise / plain.general_rise


@dataclass(frozen=True)
class Choice:
    """The chosen strength, None where none will do, and why, in one sentence."""

    strength: float | None
    why: str


def choose(outcomes: Sequence[Outcome], keep: float) -> Choice:
    """Choose, of those that keep the share `keep` of the domain's gain, the one with the least rise of general loss.

    One of the outcomes has strength 0.
    """
    plain = next(outcome for outcome in outcomes if outcome.strength == 0)
    if not plain.domain_gain > 0:
        return Choice(None, "without it the domain's loss does not fall: there is nothing to keep, train longer")
    if not plain.general_rise > 0:
        return Choice(0.0, "without it the general loss does not rise: nothing is forgotten at this length")
    tried = sorted((outcome for outcome in outcomes if outcome.strength > 0), key=lambda outcome: outcome.strength)
    allowed = [outcome for outcome in tried if outcome.kept(plain) >= keep]
    if not allowed:
        return Choice(None, f"each strength loses more than {1 - keep:.0%} of the domain's gain: try smaller ones")
    best = min(allowed, key=lambda outcome: outcome.general_rise)
    if best.spared(plain) < LEAST_SPARED:
        return Choice(
            None, f"each that keeps {keep:.0%} of the gain spares less than {LEAST_SPARED:.0%} of general loss"
        )
    edge = " (the largest that was tried: larger ones may do more)" if best is tried[-1] else ""
    return Choice(
        best.strength,
        f"it keeps {best.kept(plain):.0%} of the domain's gain and spares {best.spared(plain):.0%} of the general "
        f"loss{edge}",
    )


def next_to_try(outcomes: Sequence[Outcome], keep: float) -> float | None:
    """Return the strength half-way, on a log scale, between the largest that keeps enough and the next one, or None."""
    plain = next(outcome for outcome in outcomes if outcome.strength == 0)
    if not (plain.domain_gain > 0 and plain.general_rise > 0):
        return None
    tried = sorted((outcome for outcome in outcomes if outcome.strength > 0), key=lambda outcome: outcome.strength)
    for low, high in itertools.pairwise(tried):
        if low.kept(plain) >= keep > high.kept(plain):
            return float(f"{math.sqrt(low.strength * high.strength):.3g}")
    return None


def log_scale(low: float, high: float, points: int) -> list[float]:
    """Return `points` strengths from `low` to `high` at equal ratios, rounded to three digits."""
    if points == 1:
        return [low]
    ratio = (high / low) ** (1 / (points - 1))
    return [float(f"{low * ratio**index:.3g}") for index in range(points)]
