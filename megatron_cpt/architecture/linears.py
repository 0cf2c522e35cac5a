"""The linear layers of a transformer layer, as Hugging Face has them: what a low-rank adapter can be added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families.family import Split
from megatron_cpt.architecture.tensors import hf_shapes, megatron_tensors

LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR_NAMES: tuple[LinearName, ...] = get_args(LinearName)


@dataclass(frozen=True)
class Linear:
    """One Hugging Face linear, and the Megatron linear that it is a part of."""

    name: LinearName
    module: str  # in a Hugging Face layer, such as self_attn.q_proj
    fused: str  # in a Megatron layer, such as linear_qkv
    in_features: int
    out_features: int
    split: Split | None  # what tensor parallelism divides of the Megatron linear

    def adapter_name(self, layer: int, factor: str) -> str:
        """Return the name that peft gives to factor A or B of the adapter in `layer`, counted from 0."""
        return f"base_model.model.model.layers.{layer}.{self.module}.lora_{factor}.weight"


def linears(arch: Architecture) -> dict[str, Linear]:
    """Return the linears of a layer by name, in the order of the rows of the Megatron linears."""
    found: dict[str, Linear] = {}
    for tensor in megatron_tensors(arch):
        if tensor.layer != 0 or len(tensor.shape) < 2:
            continue
        for weight, (rows, columns) in hf_shapes(tensor, arch).items():
            module = weight.removeprefix("model.layers.0.").removesuffix(".weight")
            name = next(known for known in LINEAR_NAMES if module.endswith(f".{known}"))
            fused = tensor.name_in_layer.split(".")[-2]
            found[name] = Linear(name, module, fused, columns, rows, tensor.split)
    return found
