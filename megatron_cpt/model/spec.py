"""Which modules a transformer layer is made of: the one place where an attention back end is chosen.

All back ends write the same checkpoint keys, TransformerEngine's: there the norms are part of the linear layer
that follows them, and Megatron-Core's local spec maps its own norms onto those names. So a checkpoint written on
a laptop continues on a GPU cluster, and back. To add a back end: a class with the interface of
`attention.SdpaAttention`, and a line in `CORE_ATTENTION`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.errors import ConfigError
from megatron_cpt.model.attention import SdpaAttention, UnfusedAttention
from megatron_cpt.model.block_causal import BlockCausalAttention
from megatron_cpt.runtime.cpu_kernels import rms_norm

CORE_ATTENTION: dict[str, type] = {
    "sdpa": SdpaAttention,
    "block_causal": BlockCausalAttention,
    "unfused": UnfusedAttention,
}


AdaptLayer = Callable[[ModuleSpec], None]  # changes the spec of a layer in place


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm (Zhang and Sennrich, arXiv:1910.07467) that knows sequence parallelism.

    Under sequence parallelism each TP rank sees a part of the tokens; the mark on the weight makes Megatron-Core
    sum its gradient over the TP group. Megatron-Core's wrapper of torch's norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        if x.is_cuda:
            return super().forward(x)
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class LayerModules:
    """The classes that take the place of TransformerEngine's; constructed as `SdpaAttention` and `RMSNorm` are."""

    core_attention: type
    norm: type = RMSNorm


def transformer_engine_is_usable() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def resolve_attention(asked: str, *, adapters: bool = False) -> str:
    """`auto` -> the fastest back end of this machine; ConfigError when `te` is asked for and not available.

    With adapters TransformerEngine is left out: it fuses the norms into the linears that adapters read the input of.
    """
    if asked == "auto":
        on_gpu = "te" if transformer_engine_is_usable() and not adapters else "sdpa"
        return on_gpu if torch.cuda.is_available() else "block_causal"
    if asked == "te" and not transformer_engine_is_usable():
        why = "is not installed" if torch.cuda.is_available() else "needs CUDA, which is not available here"
        raise ConfigError(
            f"model.attention = te, but TransformerEngine {why}", hint="set model.attention: auto or sdpa"
        )
    return asked


def layer_spec(
    config: TransformerConfig,
    attention: str | LayerModules,
    *,
    document_attention: bool = False,
    vp_stage: int | None = None,
    adapt: AdaptLayer | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec for GPTModel. `attention` is `te`, a key of CORE_ATTENTION, or the classes to build with.

    `adapt` changes the linears of a layer; TransformerEngine's are none that it could.

    With documents kept apart, TransformerEngine's linear layers and norms work with torch's SDPA, which needs
    neither a mask nor another data layout.
    """
    if attention == "te":
        assert adapt is None, "resolve_attention chooses another back end for adapters"
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if document_attention:
            layer.submodules.self_attention.submodules.core_attention = SdpaAttention
        return layer
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    modules = LayerModules(CORE_ATTENTION[attention]) if isinstance(attention, str) else attention
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = modules.norm
    heads = parts.self_attention.submodules
    heads.core_attention = modules.core_attention
    if config.qk_layernorm:
        heads.q_layernorm = heads.k_layernorm = modules.norm
    if adapt is not None:
        adapt(layer)
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=modules.norm)
