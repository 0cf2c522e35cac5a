"""Megatron-Core's parallel linears with adapters inside, put in the place of the plain ones by the layer spec.

They are subclasses, so names of weights and keys of checkpoints stay what they are; the factors lie beside the weight
as `lora.q_proj.A`, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_cpt.architecture.linears import Linear
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.peft.pair import Kind, Pair


def _add_pairs(owner: Any, lora: LoraConfig, parts: Sequence[Linear], kind: Kind, tp: int) -> nn.ModuleDict:
    pairs: dict[str, nn.Module] = {}
    for part in parts:
        shape = part.out_features, part.in_features
        shape = (shape[0] // tp, shape[1]) if kind == "column" else (shape[0], shape[1] // tp)
        if part.name in lora.targets:
            pairs[part.name] = Pair(lora, shape, kind, owner.weight, owner)
    return nn.ModuleDict(pairs)


def _shards(owner: Any, cut: dict[str, int], prefix: str, offsets: tuple[Any, ...], metadata: Any) -> Any:
    """As the plain linears do it, with the factors: `cut` is the axis of what tensor parallelism divides."""
    factor, axis = ("B", 0) if "bias" in cut else ("A", 1)
    cut = cut | {f"lora.{name}.{factor}": axis for name in owner.lora}
    return make_sharded_tensors_for_checkpoint(
        owner.state_dict(prefix="", keep_vars=True),
        prefix,
        cut,
        offsets,
        tp_group=owner.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )


class LoraColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Queries, keys and values, or gate and up: adapters of several Hugging Face linears side by side."""

    def __init__(self, *args: Any, lora: LoraConfig, parts: Sequence[Linear], groups: int, **kwargs: Any) -> None:
        """`parts`: the Hugging Face linears, in the order of their rows; `groups`: key/value heads of the model."""
        super().__init__(*args, **kwargs)
        tp = self.tp_group.size()
        self._groups = groups // tp
        self._rows = {part.name: part.out_features // tp for part in parts}
        self.lora = _add_pairs(self, lora, parts, "column", tp)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, in_features] -> the linear's output with that of the adapters, and its bias."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self._delta(input_, output), bias

    def _delta(self, x: Tensor, output: Tensor) -> Tensor:
        lead = output.shape[:2]
        parts = [self.lora[n](x) if n in self.lora else output.new_zeros(*lead, r) for n, r in self._rows.items()]
        if len(parts) == 3:  # rows of q, k and v are interleaved by group of heads
            return torch.cat([part.view(*lead, self._groups, -1) for part in parts], -1).flatten(2)
        return torch.cat(parts, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> Any:
        return _shards(self, {"weight": 0, "bias": 0}, prefix, sharded_offsets, metadata)


class LoraRowLinear(RowParallelLinear):  # type: ignore[misc]
    """The output of the attention or of the MLP, with one adapter."""

    def __init__(self, *args: Any, lora: LoraConfig, parts: Sequence[Linear], groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = _add_pairs(self, lora, parts, "row", self.tp_group.size())

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in_features / TP] -> the linear's output with that of the adapter, and its bias."""
        output, bias = super().forward(input_)
        (pair,) = self.lora.values()
        return output + pair(input_), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> Any:
        return _shards(self, {"weight": 1}, prefix, sharded_offsets, metadata)
