"""The penalty that holds weights near the base's: elastic weight consolidation, and L2-SP as its plainest case.

With theta* the base's weights and F the importance of each, the loss per token grows by

    strength / 2 * sum of F (theta - theta*)^2

F is the diagonal of the Fisher information (Kirkpatrick et al. 2017, arXiv:1612.00796), or 1 for every weight, which is
L2-SP (Li et al. 2018, arXiv:1802.01483). It works on the fp32 values that this rank's optimizer updates, and so keeps
theta* and F of these alone: 8 bytes per parameter, 4 for L2-SP, spread over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.forgetting.fisher import load_importance
from megatron_cpt.model.owned_parameters import OwnedParameter

_PART_ELEMENTS = 2**26  # of a parameter that are worked on at once
_CPU_PART_ELEMENTS = 2**17  # so few that they stay in a processor's cache from pass to pass


class WeightPenalty:
    """A `train.terms.Penalty`. `base` and `importance` have a tensor per owned parameter, in their order."""

    name: str = "ewc"

    def __init__(self, strength: float, base: Sequence[Tensor], importance: Sequence[Tensor] | None = None) -> None:
        self.strength, self.base, self.importance = strength, base, importance

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds from step to step."""
        return [*self.base, *(self.importance or ())]

    def add_gradients(self, parameters: Sequence[OwnedParameter]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.base[0].device if self.base else None)
        for index, (parameter, base) in enumerate(zip(parameters, self.base, strict=True)):
            importance = None if self.importance is None else self.importance[index]
            value = self._add_gradient(parameter.values, parameter.gradient, base, importance)
            if parameter.counted:
                total += value
        return total.mul_(self.strength / 2)

    def _add_gradient(self, values: Tensor, gradient: Tensor, base: Tensor, importance: Tensor | None) -> Tensor:
        """Add the gradient of one parameter. Return its sum of F times the squares, in fp64."""
        length = _CPU_PART_ELEMENTS if values.device.type == "cpu" else _PART_ELEMENTS
        total = torch.zeros((), dtype=torch.float64, device=values.device)
        for start in range(0, len(values), length):
            part = slice(start, start + length)
            moved = values[part] - base[part]
            pull = moved if importance is None else moved * importance[part]
            gradient[part].add_(pull, alpha=self.strength)
            total += pull.dot(moved)
        return total


def weight_penalties(
    config: RunConfig, arch: Architecture, owned: Sequence[OwnedParameter]
) -> tuple[WeightPenalty, ...]:
    """Return the penalty of a run, nothing where it has no effect; collective. `owned` hold the base's weights now.

    Raises:
        CheckpointError: on every rank, when the Fisher values are incomplete or of another model.
    """
    asked = config.forgetting.active_ewc
    if asked is None:
        return ()
    base = [parameter.values.clone() for parameter in owned]
    importance = None if asked.folder is None else load_importance(config, arch, owned, asked.folder)
    return (WeightPenalty(asked.strength, base, importance),)
