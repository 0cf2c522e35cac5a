"""What the kernels of a GPU keep and make, as modules that compute nothing: they count where no GPU is.

A fused norm keeps its input and one number per row; attention in the manner of FlashAttention (Dao, arXiv:2307.08691)
keeps its inputs, its output and one number per query and head, never the matrix of scores.

Shapes: s sequence on this rank, b samples, h query heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.model.attention import SdpaAttention, UnfusedAttention
from megatron_cpt.model.block_causal import BlockCausalAttention
from megatron_cpt.model.spec import LayerModules, RMSNorm


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        result: Tensor = _FusedNorm.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


class _Flash(torch.autograd.Function):
    """q, k, v in any layout -> output of the shape of q, which is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sums = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, context, log_sums)
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = _Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
    return result


class TransformerEngineAttention(SdpaAttention):
    """TransformerEngine's: in the layout of the layer, so nothing is copied, and no rank gathers keys and values."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]."""
        return _flash(query, key, value).flatten(2)


class FlashSdpaAttention(SdpaAttention):
    """torch's scaled_dot_product_attention with its flash kernel, within the layouts of `SdpaAttention`."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash(q, k, v)


_OF_A_GPU: dict[str, type] = {
    "te": TransformerEngineAttention,
    "sdpa": FlashSdpaAttention,
    "unfused": UnfusedAttention,
    "block_causal": BlockCausalAttention,
}


def modules_of_a_gpu(config: RunConfig) -> LayerModules:
    """Return the stand-ins for the classes that the run uses on a GPU with TransformerEngine; adapters go without.

    With documents kept apart the attention is torch's, as in `model.spec.layer_spec`.
    """
    attention = config.model.attention
    if attention == "auto":
        attention = "sdpa" if config.lora.on else "te"
    if attention == "te" and config.model.document_attention:
        attention = "sdpa"
    return LayerModules(_OF_A_GPU[attention], FusedNorm)
