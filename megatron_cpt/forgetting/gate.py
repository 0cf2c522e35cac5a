"""The gate: how much worse a run may become on general text before somebody, or the run itself, does something.

Each validation is compared with the first one of its set, as a rule before the first step. What the decision rests on
is a part of every checkpoint, so a resumed run decides alike. Pure and torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_cpt.config.sections.forgetting import GateConfig


@dataclass(frozen=True)
class Gate:
    """What a run remembers of its validations; a `train.position.Component`."""

    first: Mapping[str, float] = field(default_factory=dict)  # loss of each general set when it was first measured
    within: bool = True  # whether the last validation was within the limit
    rate_factor: float = 1.0  # of the learning rate: lowered at each return to an earlier checkpoint
    rollbacks: int = 0

    def after(self, asked: GateConfig, validation: Mapping[str, float]) -> tuple[Gate, Judgement]:
        """Return the gate after a validation with these losses per set, and what it says of it."""
        measured = {name: validation[name] for name in asked.general}
        first = {**measured, **{name: loss for name, loss in self.first.items() if name in measured}}
        judgement = Judgement({name: _increase(first[name], measured[name]) for name in measured}, asked.limit)
        return replace(self, first=first, within=judgement.within), judgement

    def rolled_back(self, asked: GateConfig) -> Gate:
        """Return the gate after a return to a checkpoint within the limit, at a lower rate."""
        lower = self.rate_factor * asked.rate_factor
        return replace(self, within=True, rate_factor=lower, rollbacks=self.rollbacks + 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "first": dict(self.first),
            "within": self.within,
            "rate_factor": self.rate_factor,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Gate:
        return cls(dict(raw["first"]), raw["within"], raw["rate_factor"], raw["rollbacks"])


@dataclass(frozen=True)
class Judgement:
    """How far the perplexity of each general set has risen, as a share of its first; negative where it fell."""

    increases: Mapping[str, float]
    limit: float

    @property
    def worst(self) -> str:
        """The set that rose most; one that is not a number counts as most."""
        return max(self.increases, key=lambda name: _rank(self.increases[name]))

    @property
    def within(self) -> bool:
        return all(increase <= self.limit for increase in self.increases.values())

    def describe(self) -> str:
        """One line of the set that rose most."""
        increase = self.increases[self.worst]
        more = "more than" if not increase <= self.limit else "within"
        return f"perplexity of {self.worst} is {increase:+.1%} against its first, {more} the limit of {self.limit:.1%}"


def _increase(first: float, now: float) -> float:
    """By which share exp(loss) has grown."""
    return math.expm1(min(now - first, 700.0))  # beyond, a float has no room for it


def _rank(increase: float) -> float:
    return math.inf if math.isnan(increase) else increase
