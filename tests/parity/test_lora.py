"""LoRA computes under every layout what transformers and peft compute; every mistake made on purpose is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.conftest import launch
from tests.parity.lora_rows import (
    BF16_ROWS,
    GRAD_NORM_BOUND,
    LORA_LR,
    LORA_ROWS,
    LORA_STEPS,
    LOSS_BOUND,
    LoraRow,
    values,
)
from tests.parity.tiny_models import MODELS, hf_model

HONEST = [row for row in LORA_ROWS if row.sabotage is None]
SABOTAGED = [row for row in LORA_ROWS if row.sabotage is not None]
Curves = tuple[list[float], list[float]]  # losses, gradient norms


@pytest.fixture(scope="module")
def measured(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[LoraRow], dict[str, Any]]:
    cache: dict[int, dict[str, Any]] = {}

    def of(row: LoraRow) -> dict[str, Any]:
        if row.ranks not in cache:
            folder = tmp_path_factory.mktemp(f"lora{row.ranks}")
            cache[row.ranks] = launch(row.ranks, tiny_models, folder, "lora_worker.py")
        return cache[row.ranks][row.name]

    return of


@pytest.fixture(scope="module")
def reference() -> Callable[[LoraRow], Curves]:
    cache: dict[str, Curves] = {}

    def of(row: LoraRow) -> Curves:
        key = f"{row.model} {row.lora} {row.zero_b}"
        if key not in cache:
            cache[key] = train_with_peft(row)
        return cache[key]

    return of


def peft_model(row: LoraRow) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = {key.removeprefix("lora."): value for key, value in row.lora.items()}
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        use_rslora=lora.get("rslora", False),
        target_modules=lora.get("targets", "all-linear"),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(hf_model(row.model, seed=list(MODELS).index(row.model)), config)
    from megatron_cpt.peft.adapters import draw

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                first = draw if row.zero_b else values
                parameter.copy_(first(name.replace(".default", ""), tuple(parameter.shape), 1234))
    return model


def train_with_peft(row: LoraRow) -> Curves:
    from tests.parity.worker import GLOBAL_BATCH, sample

    model = peft_model(row)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LORA_LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step in range(LORA_STEPS):
        samples = [sample(step, index, model.config.vocab_size) for index in range(GLOBAL_BATCH)]
        tokens, labels, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "labels", "loss_mask"))
        nats = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (nats * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def differences(ours: dict[str, Any], theirs: Curves) -> tuple[float, float]:
    assert len(ours["loss"]) == LORA_STEPS
    loss = max(abs(a - b) for a, b in zip(ours["loss"], theirs[0], strict=True))
    norm = max(abs(a - b) / b for a, b in zip(ours["grad_norm"], theirs[1], strict=True))
    return loss, norm


@pytest.mark.parametrize("row", HONEST, ids=lambda row: row.name)
def test_lora_equals_peft(row: LoraRow, measured: Any, reference: Any) -> None:
    ours = measured(row)
    loss, norm = differences(ours, reference(row))
    assert loss <= LOSS_BOUND, (loss, norm)
    assert norm <= GRAD_NORM_BOUND, (loss, norm)
    assert ours["frozen_unchanged"] and ours["only_adapters"]
    assert ours["replicas_differ"] == 0.0


@pytest.mark.parametrize("row", SABOTAGED, ids=lambda row: row.name)
def test_sabotage_is_noticed(row: LoraRow, measured: Any, reference: Any) -> None:
    loss, norm = differences(measured(row), reference(row))
    assert loss > 10 * LOSS_BOUND, (loss, norm)
    assert norm > 10 * GRAD_NORM_BOUND, (loss, norm)


def test_full_recomputation_without_the_hook_trains_nothing(measured: Any) -> None:
    row = next(row for row in SABOTAGED if row.sabotage == "no_hook")
    assert measured(row)["grad_norm"] == [0.0] * LORA_STEPS


@pytest.mark.parametrize("row", BF16_ROWS, ids=lambda row: row.name)
def test_bf16_stays_near_fp32(row: LoraRow, measured: Any, reference: Any) -> None:
    loss, _ = differences(measured(row), reference(row))
    assert loss <= 2e-2
