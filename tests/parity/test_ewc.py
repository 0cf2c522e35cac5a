"""EWC against transformers: Fisher values by plain autograd, and the penalty written into the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.conftest import RESULTS
from tests.parity.rows import EWC, STEPS
from tests.parity.tiny_models import MODELS, hf_model

LAYOUTS = ("tp2", "pp2", "cp2", "dp2", "pp2_vpp2")


def dense_fisher(model: Any, samples_at_once: int) -> list[torch.Tensor]:
    """The mean over tokens of the squared gradient of `samples_at_once` samples, one tensor per parameter."""
    from tests.parity.worker import FISHER_SAMPLES, sample

    squares, tokens = [torch.zeros_like(p) for p in model.parameters()], 0.0
    for first in range(0, FISHER_SAMPLES, samples_at_once):
        nats = torch.zeros(())
        for number in range(first, min(first + samples_at_once, FISHER_SAMPLES)):
            one = sample(1000, number, 512)
            logits = model(one["tokens"][None]).logits[0]
            uniform = torch.rand(
                1, len(logits), generator=torch.Generator().manual_seed((7 << 31) + number), dtype=torch.float64
            )
            below = logits.detach().softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
            labels = (below <= uniform[0, :, None] * below[:, -1:]).sum(dim=-1)
            nats = nats + (F.cross_entropy(logits, labels, reduction="none") * one["loss_mask"]).sum()
            tokens += float(one["loss_mask"].sum())
        for square, gradient in zip(squares, torch.autograd.grad(nats, list(model.parameters())), strict=True):
            square += gradient.pow(2)
    return [square / tokens for square in squares]


@pytest.fixture(scope="module")
def oracle() -> Any:
    """run(model, samples_at_once) -> (losses, gradient norms, penalties) of transformers with torch's AdamW."""
    from tests.parity.worker import GLOBAL_BATCH, LR, sample

    def run(name: str, samples_at_once: int = 1) -> tuple[list[float], list[float], list[float]]:
        model = hf_model(name, seed=list(MODELS).index(name))
        base = [parameter.detach().clone() for parameter in model.parameters()]
        fisher = dense_fisher(model, samples_at_once)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        rows: list[tuple[float, float, float]] = []
        for step in range(STEPS):
            samples = [sample(step, index, 512) for index in range(GLOBAL_BATCH)]
            tokens, labels, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels", "loss_mask"))
            nats = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
            mean = (nats * mask.flatten()).sum() / mask.sum()
            moved = zip(model.parameters(), base, fisher, strict=True)
            penalty = EWC / 2 * torch.stack([(f * (own - its).pow(2)).sum() for own, its, f in moved]).sum()
            optimizer.zero_grad()
            (mean + penalty).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            rows.append((mean.item(), norm, penalty.item()))
        losses, norms, penalties = zip(*rows, strict=True)
        return list(losses), list(norms), list(penalties)

    return run


def penalties_of(measured: Any) -> list[float]:
    return [terms["ewc"] for terms in measured["terms"]]


@pytest.mark.parametrize(("row", "model"), [("ewc", "base"), ("ewc_tied", "base_tied")])
def test_fisher_and_penalty_equal_transformers(row: str, model: str, oracle: Any, parity_results: RESULTS) -> None:
    measured = parity_results(1)[row]
    losses, norms, penalties = oracle(model)
    assert measured["loss"] == pytest.approx(losses, abs=5e-6)
    assert measured["grad_norm"] == pytest.approx(norms, rel=2e-5)
    assert penalties_of(measured) == pytest.approx(penalties, rel=5e-5)


def test_the_squared_gradient_of_a_batch_is_another_thing(oracle: Any, parity_results: RESULTS) -> None:
    """The negative control: the same oracle, with the squares of two samples' gradients together."""
    measured = penalties_of(parity_results(1)["ewc"])
    assert measured[-1] != pytest.approx(oracle("base", samples_at_once=2)[2][-1], rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_penalty_is_alike_under_every_layout(layout: str, parity_results: RESULTS) -> None:
    whole, cut = penalties_of(parity_results(1)["ewc"]), penalties_of(parity_results(2)[f"ewc_{layout}"])
    assert cut == pytest.approx(whole, rel=1e-4)
