"""A recipe for continued pre-training: what the published evidence proposes for this model, shift and budget.

Each proposal says what it rests on, how well that is known, and what contradicts it. Grades: P, the paper itself was
read; S, a secondary note of it was read; M, measured by this project; I, inference. It proposes; the user decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_cpt.launch.survey import Survey
from megatron_cpt.planner.advice import (
    EPOCHS_EVIDENCE,
    LARGE_MODEL_PARAMETERS,
    LONG_BUDGET_TOKENS,
    REPLAY_EVIDENCE,
    REWARM_EVIDENCE,
    SHORT_BUDGET_TOKENS,
    WARMUP_EVIDENCE,
)

Shift = Literal["weak", "strong"]
# Domain text that needs so many times the bits per byte of general text is another language to the model.
STRONG_SHIFT_RATIO = 1.25
_MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class Proposal:
    """One key of the config.

    Attributes:
        value: what is proposed, as it is written on the command line; None where nothing is known.
        current: what the config says.
        why: one sentence.
        evidence: sources and grade.
        conflict: what speaks against it.
        requires: what the config must have first, where it has not.
    """

    key: str
    value: str | None
    current: str
    why: str
    evidence: str
    conflict: str | None = None
    requires: str | None = None


def shift_of(domain_bits_per_byte: float, general_bits_per_byte: float) -> Shift:
    """How far the domain is from what the base model knows, from its own bits per byte of text on both.

    No paper gives a threshold: the ratio is an inference (I).
    """
    return "strong" if domain_bits_per_byte > STRONG_SHIFT_RATIO * general_bits_per_byte else "weak"


def propose(found: Survey, shift: Shift) -> list[Proposal]:
    """Return proposals for budget, rate, warm-up, schedule, replay, the gate and KL, all for the proposed budget."""
    epochs = list(_epochs(found))
    tokens = int(epochs[0].value or 0) if epochs else found.derived.train_tokens
    return [
        *epochs,
        *_rate(found, tokens),
        _warmup(found, tokens),
        *_schedule(found, tokens),
        _replay(found, shift),
        _gate(found),
        *_kl(found, shift),
    ]


def _tokens(proposed: int, current: int) -> str:
    """A number of tokens; what is there already where the two are the same but for rounding."""
    return str(current if abs(proposed - current) <= 0.01 * proposed else proposed)


def _rate(found: Survey, tokens: int) -> Iterator[Proposal]:
    config = found.config
    current = f"{config.optimizer.lr:g}"
    if config.lora.on:
        yield Proposal(
            "optimizer.lr", None, current, "adapters take about ten times the rate of all weights",
            "LoRA Learns Less and Forgets Less, arXiv:2405.09673; S",
            "measure it: --pilot",
        )  # fmt: skip
        return
    if found.arch.num_parameters < LARGE_MODEL_PARAMETERS:
        yield Proposal(
            "optimizer.lr", None, current,
            "no published rate for so small a model and budget; too high a rate forgets more and learns less",
            "on a 135M model half the rate did both better: examples/forgetting_study; M",
            "measure it: --pilot",
        )  # fmt: skip
        return
    if tokens < SHORT_BUDGET_TOKENS:
        value, why = 1e-5, "5e-6 to 3e-5 kept general ability for fewer than 5B tokens"
        evidence = "ChipNeMo and EntiGraph use 5e-6; 3e-4 harmful, 3e-5 good: arXiv:2406.14833; S"
        conflict = "a cloud recipe of Qwen2-72B uses 5e-5 and gives no result"
    elif tokens < LONG_BUDGET_TOKENS:
        value, why = 3e-5, "a third to a tenth of the rate of the pre-training"
        evidence, conflict = (
            "a survey of recipes; S",
            "re-warming to the full rate: Ibrahim et al., arXiv:2403.08763; P",
        )
    else:
        value, why = 1e-4, "re-warm towards the rate of the pre-training; take that rate where it is known"
        evidence = REWARM_EVIDENCE
        conflict = "starting at the least rate of the pre-training, without warm-up: arXiv:2407.07263; S"
    yield Proposal("optimizer.lr", f"{value:g}", current, why, evidence, conflict)
    yield Proposal(
        "optimizer.min_lr", f"{value / 10:g}", f"{config.optimizer.min_lr:g}", "a tenth of the peak",
        "Ibrahim et al. 2024, arXiv:2403.08763; S",
        "a hundredth: arXiv:2407.07263; S",
    )  # fmt: skip


def _warmup(found: Survey, tokens: int) -> Proposal:
    return Proposal(
        "budget.warmup_tokens", _tokens(tokens // 100, found.derived.warmup_tokens), str(found.derived.warmup_tokens),
        "1 % of the budget; between 0 and 2 % its length matters little",
        WARMUP_EVIDENCE,
        "none at all when it starts at the least rate of the pre-training: arXiv:2407.07263; S",
    )  # fmt: skip


def _schedule(found: Survey, tokens: int) -> Iterator[Proposal]:
    config = found.config
    if config.phases:
        return
    evidence = "MiniCPM, arXiv:2404.06395; S"
    yield Proposal(
        "schedule.kind", "wsd", config.schedule.kind,
        "a stable stretch that can be prolonged or branched, then a decay", evidence, "cosine does as well; S",
    )  # fmt: skip
    yield Proposal(
        "schedule.decay_tokens", _tokens(tokens // 10, found.derived.decay_tokens), str(found.derived.decay_tokens),
        "the last 10 % of the budget; 2.5 % was not enough", evidence,
    )  # fmt: skip


def _replay(found: Survey, shift: Shift) -> Proposal:
    config = found.config
    has_replay = any(source.role == "replay" for source in config.data.train)
    value = "25%" if shift == "strong" else "5%"
    why = (
        "another language or code: a quarter equals retraining on everything"
        if shift == "strong"
        else "a related domain: a twentieth almost equals retraining on everything"
    )
    ratio = config.data.replay_ratio
    return Proposal(
        "data.replay_ratio", value, "none" if ratio is None else f"{float(ratio):.3g}", why,
        REPLAY_EVIDENCE,
        "1 % is said to be enough: Meditron, arXiv:2502.06042; S"
        if shift == "strong"
        else "5 % of another kind of text spared a half, 25 % three quarters: examples/forgetting_study; M",
        None if has_replay else "a source of general text in data.train with role: replay",
    )  # fmt: skip


def _epochs(found: Survey) -> Iterator[Proposal]:
    often = [source for source in found.sources if (source.epochs_at_end or 0) > _MAX_EPOCHS]
    if not often:
        return
    worst = max(often, key=lambda source: source.epochs_at_end or 0)
    tokens = int(found.derived.train_tokens * _MAX_EPOCHS / (worst.epochs_at_end or 1))
    yield Proposal(
        "budget.train_tokens", str(tokens), str(found.derived.train_tokens),
        f"in the mix as it is {worst.name!r} is read {worst.epochs_at_end:.1f} times; beyond 4 that is worth little",
        EPOCHS_EVIDENCE,
        "or a smaller share of it",
    )  # fmt: skip


def _gate(found: Survey) -> Proposal:
    gate = found.config.forgetting.gate
    return Proposal(
        "forgetting.gate.max_general_perplexity_increase", "3%",
        "none" if gate is None else f"{float(gate.max_general_perplexity_increase):.3g}",
        "forgetting is measured and limited, not hoped away",
        "no paper gives a limit; I",
        None,
        None if gate is not None else "general sets of data.validation, named in forgetting.gate.general",
    )  # fmt: skip


def _kl(found: Survey, shift: Shift) -> Iterator[Proposal]:
    replay = [source.name for source in found.config.data.train if source.role == "replay"]
    if not replay or found.config.lora.on:
        return
    kl = found.config.forgetting.kl
    yield Proposal(
        "forgetting.kl",
        f"{{weight: 1, sources: [{', '.join(replay)}]}}",
        "none" if kl is None else f"weight {kl.weight:g}",
        "divergence from the base on replayed tokens, as much as their cross entropy"
        + ("" if shift == "strong" else "; optional where the shift is weak"),
        "MoL, arXiv:2505.12043; P. On a 135M model it spared 119 % instead of 76 % of the rise: "
        "examples/forgetting_study; M",
        "it costs up to 1.4 times a step, or 1.1 with stored targets",
    )  # fmt: skip
