"""Where a run stands: a frozen value that the loop replaces at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_cpt.config.sections.failure import FailureConfig
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.guard import Guard


@dataclass(frozen=True)
class Progress:
    iteration: int = 0  # optimizer steps done, skipped ones included
    ledger: Ledger = field(default_factory=Ledger)
    validation: Mapping[str, float] = field(default_factory=dict)  # loss per named set, as last measured
    guard: Guard = field(default_factory=Guard)

    def after_step(self, ledger: Ledger, loss: float, skipped: bool, failure: FailureConfig) -> Progress:
        return replace(
            self, iteration=self.iteration + 1, ledger=ledger, guard=self.guard.after(failure, loss, skipped)
        )

    def memory_json(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the ledger, by component."""
        return {"guard": self.guard.to_json()}

    @classmethod
    def from_marker(cls, marker: Marker) -> Progress:
        guard = Guard.from_json(marker.memory["guard"])
        return cls(marker.iteration, Ledger.from_json(marker.ledger), marker.validation, guard)
