"""KL from the stored probabilities of a few tokens: exact for what is told apart, and its gradient is autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_cpt.forgetting.topk_kl import topk_kl
from megatron_cpt.forgetting.vocab_parallel_kl import vocab_parallel_kl

SHAPE, REAL = (5, 2, 12), 10


def stored(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    log_q = (logits[..., :REAL] / temperature).log_softmax(-1)
    values, ids = log_q.topk(k, dim=-1)
    rest = (1 - values.exp().sum(-1, keepdim=True)).log() if k < REAL else torch.full((*SHAPE[:2], 1), -60.0)
    return ids, torch.cat([values, rest], -1)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    own, other = (2 * torch.randn(SHAPE, generator=generator) for _ in range(2))
    return own.requires_grad_(), other


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_with_every_token_it_is_the_divergence(pair: tuple[Tensor, Tensor], reverse: bool, temperature: float) -> None:
    own, other = pair
    options = {"real_rows": REAL, "temperature": temperature, "reverse": reverse}
    whole = vocab_parallel_kl(own, other, **options)
    (wanted,) = torch.autograd.grad(whole.sum(), own)
    ids, log_q = stored(other, REAL, temperature)
    found = topk_kl(own, ids, log_q, first_row=0, **options)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_rest_is_one_outcome_and_the_gradient_is_autograds(pair: tuple[Tensor, Tensor], reverse: bool) -> None:
    own, other = pair
    ids, log_q = stored(other, 3, 1.0)
    found = topk_kl(own, ids, log_q, first_row=0, real_rows=REAL, reverse=reverse)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    p = own[..., :REAL].softmax(-1)
    chosen = p.gather(-1, ids)
    outcomes = torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
    q = log_q.exp()
    dense = (outcomes * (outcomes.log() - log_q) if reverse else q * (log_q - outcomes.log())).sum(-1)
    (wanted,) = torch.autograd.grad(dense.sum(), own)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    whole = vocab_parallel_kl(own, other, real_rows=REAL, reverse=reverse)
    assert (found <= whole + 1e-6).all() and (found > 0).all()
