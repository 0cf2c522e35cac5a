"""Adapters of a whole model: put into its layers, found there, and given their first values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import Linear, linears
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.peft.linear import LoraColumnLinear, LoraRowLinear
from megatron_cpt.peft.pair import Pair


@dataclass(frozen=True)
class Adapter:
    """One adapter of this rank."""

    linear: Linear
    layer: int  # over the whole model, from 0
    pair: Pair

    def name(self, factor: str) -> str:
        """Return the name that peft gives to factor A or B."""
        return self.linear.adapter_name(self.layer, factor)


def adapted_layer(lora: LoraConfig, arch: Architecture) -> Callable[[ModuleSpec], None]:
    """Return what puts linears with adapters into the spec of a layer; a linear without a target stays plain."""
    of_fused: dict[str, list[Linear]] = {}
    for linear in linears(arch).values():
        of_fused.setdefault(linear.fused, []).append(linear)

    def adapt(layer: ModuleSpec) -> None:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        for fused, parts in of_fused.items():
            if any(part.name in lora.targets for part in parts):
                kind = LoraColumnLinear if parts[0].split == "rows" else LoraRowLinear
                params = {"lora": lora, "parts": tuple(parts), "groups": arch.num_query_groups}
                owner = attention if hasattr(attention, fused) else mlp
                setattr(owner, fused, ModuleSpec(module=kind, params=params))

    return adapt


def adapters(chunks: Sequence[GPTModel], arch: Architecture) -> Iterator[Adapter]:
    """Yield every adapter of this rank's bare chunks."""
    of_model = linears(arch)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for module in layer.modules():
                if isinstance(module, LoraColumnLinear | LoraRowLinear):
                    for name, pair in module.lora.items():
                        assert isinstance(pair, Pair)
                        yield Adapter(of_model[name], layer.layer_number - 1, pair)


@torch.no_grad()
def set_first_values(chunks: Sequence[GPTModel], arch: Architecture, seed: int) -> None:
    """Set A to peft's Kaiming-uniform values and B to zero, so that the model begins as its base.

    Drawn from the shape of the whole, by seed and name: equal under every layout.
    """
    for adapter in adapters(chunks, arch):
        pair, linear = adapter.pair, adapter.linear
        rank = pair.A.shape[0]
        rows, columns = place(pair)
        pair.A.copy_(draw(adapter.name("A"), (rank, linear.in_features), seed)[:, columns])
        pair.B.copy_(draw(adapter.name("B"), (linear.out_features, rank), seed)[rows])


def draw(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Return the first values of a whole factor by its name in peft: uniform in +-1/sqrt(in_features), or zero."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(name.encode()) ^ seed)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def place(pair: Pair) -> tuple[slice, slice]:
    """Return the rows of the whole B and the columns of the whole A that this rank holds."""
    tp_rank, everything = parallel_state.get_tensor_model_parallel_rank(), slice(None)
    if pair.kind == "column":
        rows = len(pair.B)
        return slice(tp_rank * rows, (tp_rank + 1) * rows), everything
    columns = pair.A.shape[1]
    return everything, slice(tp_rank * columns, (tp_rank + 1) * columns)


def let_gradients_begin(chunks: Sequence[GPTModel]) -> None:
    """Have the output of a frozen embedding ask for a gradient.

    A recomputed layer passes gradients on only where its input asks for one: without this it would train nothing, and
    say nothing.
    """
    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output
