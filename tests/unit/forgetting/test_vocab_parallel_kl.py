"""The divergence of one rank against torch's own, with its gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.forgetting import vocab_parallel_kl as module
from megatron_cpt.forgetting.vocab_parallel_kl import vocab_parallel_kl

ROWS, REAL = 40, 37


def drawn(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(11, 3, ROWS, generator=torch.Generator().manual_seed(seed))


def dense(own: Tensor, other: Tensor, temperature: float, reverse: bool) -> Tensor:
    """The same by torch's functions, over the real rows."""
    p, q = (F.log_softmax(logits[..., :REAL].double() / temperature, dim=-1) for logits in (own, other))
    target, given = (p, q) if reverse else (q, p)
    return F.kl_div(given, target, log_target=True, reduction="none").sum(-1) * temperature**2


@pytest.mark.parametrize("part", [2**24, 5 * ROWS])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_value_and_gradient_are_those_of_torch(
    temperature: float, reverse: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_PART_ELEMENTS", part)
    own, other, upstream = drawn(1).requires_grad_(), drawn(2), torch.rand(11, 3)
    kept = other.clone()
    result = vocab_parallel_kl(own, other, real_rows=REAL, temperature=temperature, reverse=reverse)
    expected = dense(own, other, temperature, reverse)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((result * upstream).sum(), own)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), own)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert gradient[..., REAL:].abs().max() == 0
    assert torch.equal(other, kept) and torch.equal(own.detach(), drawn(1))
    # negative control: with the padding rows it is another number
    padded = vocab_parallel_kl(own, other, real_rows=ROWS, temperature=temperature, reverse=reverse)
    assert (padded.double() - expected).abs().max() > 1e-2


def test_logits_far_apart_give_a_finite_divergence_and_gradient() -> None:
    own, other = drawn(1, 1e4).requires_grad_(), drawn(2, 1e4)
    for reverse in (False, True):
        result = vocab_parallel_kl(own, other, real_rows=REAL, reverse=reverse)
        (gradient,) = torch.autograd.grad(result.sum(), own)
        assert result.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(result.double(), dense(own, other, 1.0, reverse), rtol=1e-4, atol=1e-2)


def test_a_model_does_not_part_from_itself() -> None:
    own = drawn(1).requires_grad_()
    result = vocab_parallel_kl(own, drawn(1), real_rows=REAL)
    (gradient,) = torch.autograd.grad(result.sum(), own)
    assert result.abs().max() < 1e-6 and gradient.abs().max() == 0


def test_bf16_logits_have_a_bf16_gradient_rounded_once() -> None:
    own, other = drawn(1).bfloat16().requires_grad_(), drawn(2).bfloat16()
    upstream = torch.full((11, 3), 0.1)
    result = vocab_parallel_kl(own, other, real_rows=REAL)
    (gradient,) = torch.autograd.grad((result * upstream).sum(), own)
    exact = own.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad((dense(exact, other.float(), 1.0, False) * upstream).sum(), exact)
    assert result.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), wanted, rtol=2**-7, atol=1e-5)
