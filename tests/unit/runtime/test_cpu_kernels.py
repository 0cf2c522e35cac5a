"""The CPU's gated activation and norm against the plain operations, forward and backward, and what they keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.runtime.cpu_kernels import rms_norm, swiglu

EPS = 1e-5


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    result.backward(torch.linspace(-1, 1, result.numel()).view_as(result).to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_bit_for_bit_the_plain_operations(dtype: torch.dtype) -> None:
    x = torch.randn(7, 2, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ours, plain in zip(with_gradients(swiglu, x), with_gradients(plain_swiglu, x), strict=True):
        assert torch.equal(ours, plain)
    halves_swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)  # negative control
    assert not torch.allclose(swiglu(halves_swapped), plain_swiglu(x), atol=1e-2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_equals_torch(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(5, 2, 64, generator=generator)).to(dtype)
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).to(dtype)
    ours = with_gradients(lambda a, b: rms_norm(a, b, EPS), x, weight)
    theirs = with_gradients(lambda a, b: F.rms_norm(a, (64,), b, EPS), x, weight)
    assert [tensor.dtype for tensor in ours] == [dtype] * 3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=bound, atol=bound)
    assert not torch.allclose(ours[0], rms_norm(x, weight, 1.0), rtol=bound, atol=bound)  # negative control


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double:UserWarning")  # fp32 by its nature
def test_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 8, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))
    weight = torch.rand(8, dtype=torch.float32, generator=generator).requires_grad_()
    single = x.detach().float().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: rms_norm(a, b, EPS), (single, weight), eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0
    )


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(x)
        rms_norm(x, weight, EPS)
    of_a_layer = [tensor for tensor in kept if tensor.numel() >= x.numel() / 2]
    assert of_a_layer and all(tensor.data_ptr() == x.data_ptr() for tensor in of_a_layer)
