"""Gated activation and norm for a CPU, as functions that keep only their input for the backward pass.

Left to autograd, each keeps two or three intermediate tensors per layer, the norm in fp32, and passes over them again.
The results are those of the plain operations; on a GPU, TransformerEngine's and torch's own kernels are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Swiglu(torch.autograd.Function):
    """x [..., 2f], gate then up -> silu(gate) * up, [..., f] (Shazeer, arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_x


class _RmsNorm(torch.autograd.Function):
    """x [..., h], weight [h] -> x / rms(x) * weight, computed in fp32 (Zhang and Sennrich, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal, wide_grad = x.float() * scale, grad.float()
        products = wide_grad * normal
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        shift = products.mul_(weight).mean(-1, keepdim=True)
        grad_x = (wide_grad * weight).sub_(normal.mul_(shift)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., f], of x [..., 2f] that holds gate, then up."""
    result: Tensor = _Swiglu.apply(x)  # type: ignore[no-untyped-call]
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x [..., h] divided by its root mean square and multiplied by `weight` [h], in the dtype of x."""
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result
