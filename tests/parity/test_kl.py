"""KL to a frozen model against transformers, where both models are dense and the divergence is torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.conftest import RESULTS
from tests.parity.rows import FORWARD_KL, REVERSE_KL, STEPS
from tests.parity.tiny_models import MODELS, hf_model


@pytest.fixture(scope="module")
def oracle() -> Any:
    """run(kl, reference) -> (losses, gradient norms, KL terms) of the steps of transformers with torch's AdamW."""
    from tests.parity.worker import GLOBAL_BATCH, LR, sample

    def run(kl: dict[str, Any], reference: str) -> tuple[list[float], list[float], list[float]]:
        model = hf_model("base", seed=list(MODELS).index("base"))
        frozen = hf_model(reference, seed=list(MODELS).index(reference))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        temperature = kl.get("temperature", 1.0)
        rows: list[tuple[float, float, float]] = []
        for step in range(STEPS):
            samples = [sample(step, index, 512) for index in range(GLOBAL_BATCH)]
            tokens, labels, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels", "loss_mask"))
            counts = torch.tensor([str(int(s["source"])) in kl.get("sources", ("0", "1")) for s in samples])
            logits = model(tokens).logits
            with torch.no_grad():
                others = frozen(tokens).logits
            p, q = (F.log_softmax(x / temperature, dim=-1) for x in (logits, others))
            first, second = (q, p) if kl.get("direction") == "reverse" else (p, q)
            divergence = F.kl_div(first, second, log_target=True, reduction="none").sum(-1) * temperature**2
            term = kl["weight"] * (divergence * mask * counts[:, None]).sum() / mask.sum()
            nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            mean = (nats * mask.flatten()).sum() / mask.sum()
            optimizer.zero_grad()
            (mean + term).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            rows.append((mean.item(), norm, term.item()))
        losses, norms, terms = zip(*rows, strict=True)
        return list(losses), list(norms), list(terms)

    return run


@pytest.mark.parametrize(
    ("row", "kl", "reference"),
    [
        ("kl", FORWARD_KL, "reference"),
        ("kl_reverse", REVERSE_KL, "reference"),
        ("kl_to_itself", FORWARD_KL, "base"),
    ],
)
def test_the_term_equals_transformers(
    row: str, kl: dict[str, Any], reference: str, oracle: Any, parity_results: RESULTS
) -> None:
    measured = parity_results(1)[row]
    losses, norms, terms = oracle(kl, reference)
    assert measured["loss"] == pytest.approx(losses, abs=5e-6)
    assert measured["grad_norm"] == pytest.approx(norms, rel=2e-5)
    assert [row["kl"] for row in measured["terms"]] == pytest.approx(terms, rel=2e-5, abs=2e-6)


def test_a_model_does_not_part_from_itself_before_its_first_step(parity_results: RESULTS) -> None:
    itself = [row["kl"] for row in parity_results(1)["kl_to_itself"]["terms"]]
    assert abs(itself[0]) < 1e-6 < itself[-1]
    # negative control: other weights of the same shape are far away from the first step on
    assert parity_results(1)["kl"]["terms"][0]["kl"] > 0.01


def test_stored_targets_of_the_whole_vocabulary_are_the_model_itself(parity_results: RESULTS) -> None:
    """But for their rounding to float16, whose error is up to 2^-11 of a logarithm of a probability."""
    stored, beside = (parity_results(1)[row] for row in ("kl_offline_whole", "kl"))
    assert stored["loss"] == pytest.approx(beside["loss"], abs=1e-4)
    assert stored["grad_norm"] == pytest.approx(beside["grad_norm"], rel=1e-3)
    terms = [[terms["kl"] for terms in measured["terms"]] for measured in (stored, beside)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-3)
    fewer = parity_results(1)["kl_offline"]["terms"]  # with fewer tokens told apart the divergence is smaller
    assert 0 < fewer[0]["kl"] < 0.9 * terms[1][0]
