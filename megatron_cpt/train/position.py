"""Where a run stands: a frozen value that the loop replaces at every step, and that every checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, cast

from megatron_cpt.config.sections.failure import FailureConfig
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import CheckpointError
from megatron_cpt.forgetting.gate import Gate
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.guard import Guard


class Component(Protocol):
    """A part of the run that remembers something from step to step: a frozen value, made without arguments."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self: ...


# By its name in a marker. A new component is one line; a checkpoint from before it starts it afresh.
COMPONENTS: dict[str, type[Component]] = {"guard": Guard, "gate": Gate}


def _fresh() -> dict[str, Component]:
    return {name: component() for name, component in COMPONENTS.items()}


@dataclass(frozen=True)
class Position:
    """Where a run stands; equal positions of one config continue alike."""

    iteration: int = 0  # optimizer steps done, refused ones included
    ledger: Ledger = field(default_factory=Ledger)
    validation: Mapping[str, float] = field(default_factory=dict)  # loss per named set, as last measured
    memory: Mapping[str, Component] = field(default_factory=_fresh)  # one per name in COMPONENTS

    @property
    def guard(self) -> Guard:
        return cast(Guard, self.memory["guard"])

    @property
    def gate(self) -> Gate:
        return cast(Gate, self.memory["gate"])

    def remembering(self, **components: Component) -> Position:
        """Return this position with other values of the named components."""
        return replace(self, memory={**self.memory, **components})

    def after_step(self, ledger: Ledger, loss: float, skipped: bool, failure: FailureConfig) -> Position:
        moved = replace(self, iteration=self.iteration + 1, ledger=ledger)
        return moved.remembering(guard=self.guard.after(failure, loss, skipped))

    def memory_json(self) -> dict[str, Any]:
        """Return what a marker keeps of the components, by name."""
        return {name: component.to_json() for name, component in self.memory.items()}

    @classmethod
    def from_marker(cls, marker: Marker) -> Position:
        """Return the position that a checkpoint stands at.

        Raises:
            CheckpointError: it remembers something that this version does not know or cannot read.
        """
        ledger = Ledger.from_json(marker.ledger)
        return cls(marker.iteration, ledger, marker.validation, _fresh() | _remembered(marker))


def _remembered(marker: Marker) -> dict[str, Component]:
    written_by = marker.versions.get("megatron_cpt", "another version")
    hint = f"continue with the version that wrote it, megatron-cpt {written_by}"
    found: dict[str, Component] = {}
    for name, raw in marker.memory.items():
        if name not in COMPONENTS:
            raise CheckpointError(
                f"the checkpoint of iteration {marker.iteration} remembers {name!r}, which this version does not know",
                hint=hint,
            )
        try:
            found[name] = COMPONENTS[name].from_json(raw)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint of iteration {marker.iteration} holds {name!r} in an unknown form: {error!r}",
                hint=hint,
            ) from error
    return found
