"""A loss term and a penalty against transformers, where they are written into the loss and left to autograd.

The penalty is on the distance from the weights of another model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.conftest import RESULTS
from tests.parity.rows import STEPS
from tests.parity.tiny_models import MODELS, hf_model


@pytest.fixture(scope="module")
def reference() -> Any:
    """run(term_weight, l2sp) -> losses, gradient norms and penalties of transformers with torch's AdamW."""
    from tests.parity.worker import GLOBAL_BATCH, LR, sample

    def run(term_weight: float, l2sp: float) -> tuple[list[float], list[float], list[float]]:
        model = hf_model("base", seed=list(MODELS).index("base"))
        other = hf_model("reference", seed=list(MODELS).index("reference"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        losses, norms, penalties = [], [], []
        for step in range(STEPS):
            samples = [sample(step, index, 512) for index in range(GLOBAL_BATCH)]
            tokens, labels, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels", "loss_mask"))
            nats = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
            mean = (nats * mask.flatten()).sum() / mask.sum()
            pairs = zip(model.parameters(), other.parameters(), strict=True)
            penalty = 0.5 * l2sp * torch.stack([(own - its.detach()).pow(2).sum() for own, its in pairs]).sum()
            optimizer.zero_grad()
            ((1 + term_weight) * mean + penalty).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            losses.append(mean.item())
            penalties.append(penalty.item())
        return losses, norms, penalties

    return run


@pytest.mark.parametrize(("row", "term_weight", "l2sp"), [("term", 0.5, 0.0), ("l2sp", 0.0, 0.05)])
def test_term_and_penalty_equal_transformers(
    row: str, term_weight: float, l2sp: float, reference: Any, parity_results: RESULTS
) -> None:
    measured = parity_results(1)[row]
    losses, norms, penalties = reference(term_weight, l2sp)
    assert measured["loss"] == pytest.approx(losses, abs=5e-6)
    assert measured["grad_norm"] == pytest.approx(norms, rel=5e-6)
    if l2sp:
        assert [row["ewc"] for row in measured["terms"]] == pytest.approx(penalties, rel=1e-5)
    # negative control: without the term or the penalty the first gradient is another one already
    plain = reference(0.0, 0.0)[1]
    assert abs(measured["grad_norm"][0] - plain[0]) > 1e-2 * plain[0]


@pytest.mark.parametrize("row", ["l2sp_tp2", "l2sp_pp2", "l2sp_cp2", "l2sp_dp2", "l2sp_dp2_plain_optimizer"])
def test_a_penalty_is_reported_alike_under_every_layout(row: str, parity_results: RESULTS) -> None:
    whole, cut = ([terms["ewc"] for terms in parity_results(n)[name]["terms"]] for n, name in ((1, "l2sp"), (2, row)))
    assert cut == pytest.approx(whole, rel=1e-6)


def test_a_terms_sum_is_reported_by_its_name(parity_results: RESULTS) -> None:
    measured = parity_results(1)["term"]
    for terms, loss in zip(measured["terms"], measured["loss"], strict=True):
        assert terms == {"second_cross_entropy": pytest.approx(0.5 * loss, rel=1e-6)}
    assert parity_results(1)["base"]["terms"][0] == {}
