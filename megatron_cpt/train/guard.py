"""Which steps are too bad to apply: a spike of the loss by a robust z-score. Pure and torch-free.

The step itself refuses what is not finite.

The z-score of a loss is its distance above the median of recent accepted losses, in units of 1.4826 * MAD (the
median absolute deviation, scaled to a standard deviation; Iglewicz and Hoaglin 1993). The unit is at least 1 % of
the median: losses that hardly vary must not make a small change look large.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_cpt.config.sections.failure import FailureConfig

_FIRST_JUDGED = 20  # accepted steps before a loss can be called a spike


@dataclass(frozen=True)
class Guard:
    """What the decision rests on; part of every checkpoint, so that a resumed run decides alike."""

    losses: tuple[float, ...] = ()  # of accepted steps, the newest last
    skips_in_row: int = 0
    rollbacks: int = 0

    def verdict(self, config: FailureConfig, loss: float, grad_norm: float) -> str | None:
        """Return why a step of finite loss and gradient must not be applied, None when it may."""
        if config.spike_zscore is None or len(self.losses) < _FIRST_JUDGED:
            return None
        score = robust_zscore(loss, self.losses)
        if score > config.spike_zscore:
            return f"loss spike: {loss:.4f} is {score:.1f} robust deviations above the recent median"
        return None

    def after(self, config: FailureConfig, loss: float, refused: bool) -> Guard:
        if refused:
            return replace(self, skips_in_row=self.skips_in_row + 1)
        return replace(self, losses=(*self.losses, loss)[-config.spike_window :], skips_in_row=0)

    def must_roll_back(self, config: FailureConfig) -> bool:
        return self.skips_in_row >= config.skips_before_rollback

    def rolled_back_to(self, earlier: Guard) -> Guard:
        """The guard of the checkpoint that was loaded, counting one more rollback of this run."""
        return replace(earlier, skips_in_row=0, rollbacks=self.rollbacks + 1)

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "skips_in_row": self.skips_in_row, "rollbacks": self.rollbacks}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Guard:
        return cls(tuple(raw["losses"]), raw["skips_in_row"], raw["rollbacks"])


def robust_zscore(value: float, reference: tuple[float, ...]) -> float:
    median = statistics.median(reference)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in reference)
    return (value - median) / max(deviation, 0.01 * abs(median), 1e-12)
