"""What the published evidence says of a config, and what would surprise its author. Advice never stops a run.

Grades: P, the paper itself was read; S, a secondary note of it was read; I, inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import format_count
from megatron_cpt.config.derive import Derived
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.launch.survey import SourceNeed, Survey

_FEW_TOKENS = 1_000_000_000
SHORT_BUDGET_TOKENS = 5_000_000_000
LONG_BUDGET_TOKENS = 100_000_000_000
# Peak rates for continued pre-training of all weights on fewer than 5B tokens.
_SHORT_BUDGET_RATES = (5e-6, 3e-5)
LARGE_MODEL_PARAMETERS = 6e9  # the rates were measured on models of this size and above
# What several pieces of advice, and the recipe, rest on.
WARMUP_EVIDENCE = "Ibrahim et al. 2024, arXiv:2403.08763, Gupta et al. 2023, arXiv:2308.04014; P"
REPLAY_EVIDENCE = "Ibrahim et al. 2024, arXiv:2403.08763, tables by a secondary note; S"
EPOCHS_EVIDENCE = "Muennighoff et al. 2023, arXiv:2305.16264; S"
REWARM_EVIDENCE = "Ibrahim et al. 2024, arXiv:2403.08763; P"


@dataclass(frozen=True)
class Advice:
    """One sentence, and what it rests on."""

    text: str
    evidence: str


def advise(survey: Survey) -> list[Advice]:
    """Return what the evidence says of rate, warm-up, schedule, replay, epochs, budget and validation."""
    config, derived = survey.config, survey.derived
    return [
        *_budget_advice(derived),
        *_rate_advice(config, survey.arch, derived),
        *_warmup_advice(derived),
        *_decay_advice(config, derived),
        *_replay_advice(config),
        *(advice for source in survey.sources for advice in _epoch_advice(source)),
        *_validation_advice(config),
        *_bubble_advice(config, derived),
    ]


def surprises(config: RunConfig, derived: Derived) -> list[str]:
    """Return what follows from the config and is easily overlooked."""
    notes = list(derived.notes)
    step = derived.tokens_per_step
    for key, every in (("checkpoint.save_every", config.checkpoint.save_every), ("eval.every", config.eval.every)):
        if every is not None and every.in_tokens(step) < step:
            notes.append(f"{key} = {every} is less than a step of {step:,} tokens: it happens at every step")
    if 0 < derived.warmup_tokens < step:
        notes.append(f"budget.warmup_tokens = {derived.warmup_tokens:,} is less than a step of {step:,} tokens")
    if config.eval.every is not None and config.eval.every.in_tokens(step) > derived.train_tokens:
        notes.append(f"eval.every = {config.eval.every} is longer than the run: only its two ends evaluate")
    if config.checkpoint.keep_every and config.checkpoint.keep_every < step:
        notes.append(
            f"checkpoint.keep_every = {format_count(config.checkpoint.keep_every)} tokens keeps every checkpoint"
        )
    if config.log.every.in_tokens(step) > derived.train_tokens:
        notes.append(f"log.every = {config.log.every} is longer than the run: no step is logged")
    return notes


def _budget_advice(derived: Derived) -> Iterator[Advice]:
    if derived.train_tokens < _FEW_TOKENS:
        yield Advice(
            f"{format_count(derived.train_tokens)} tokens are few for continued pre-training of all weights: 1B or "
            "more is advised; with less, expect style rather than knowledge",
            "practice of Qwen2-72B recipes; S",
        )


def _rate_advice(config: RunConfig, arch: Architecture, derived: Derived) -> Iterator[Advice]:
    rate, tokens = config.optimizer.lr, derived.train_tokens
    if arch.num_parameters < LARGE_MODEL_PARAMETERS:
        return
    low, high = _SHORT_BUDGET_RATES
    if tokens < SHORT_BUDGET_TOKENS and not low <= rate <= high:
        than = "above" if rate > high else "below"
        yield Advice(
            f"optimizer.lr = {rate:g} is {than} {low:g} to {high:g}, the rates that kept general ability for budgets "
            "below 5B tokens",
            "ChipNeMo and EntiGraph use 5e-6; 3e-4 harmful, 3e-5 good: The Stability Gap, arXiv:2406.14833; S",
        )
    if tokens >= LONG_BUDGET_TOKENS and rate < 3e-5:
        yield Advice(
            f"optimizer.lr = {rate:g} is low for {format_count(tokens)} tokens: re-warm towards the rate of the "
            "pre-training",
            REWARM_EVIDENCE,
        )


def _warmup_advice(derived: Derived) -> Iterator[Advice]:
    share = derived.warmup_tokens / derived.train_tokens
    if share > 0.02:
        yield Advice(
            f"the warm-up is {share:.1%} of the budget: 0 to 2 % is enough, and its length matters little",
            WARMUP_EVIDENCE,
        )


def _decay_advice(config: RunConfig, derived: Derived) -> Iterator[Advice]:
    share = derived.decay_tokens / derived.train_tokens
    if config.schedule.kind == "wsd" and share < 0.1 * (1 - 1e-6):
        yield Advice(
            f"the decay is {share:.1%} of the budget: the last 10 % is enough, 2.5 % was not",
            "MiniCPM, Hu et al. 2024, arXiv:2404.06395; S",
        )
    decays_last = bool(config.phases) and config.phases[-1].rate.course != "continue"
    if config.schedule.kind == "constant" and not decays_last:
        yield Advice(
            "the rate never decays: the last stretch of a run usually gains most when it does",
            "MiniCPM, Hu et al. 2024, arXiv:2404.06395; S",
        )


def _replay_advice(config: RunConfig) -> Iterator[Advice]:
    if len(config.data.train) == 1:
        yield Advice(
            "one training source: replay of general text is the main remedy against forgetting; 5 % for a related "
            "domain, 25 % for another language or code",
            REPLAY_EVIDENCE,
        )


def _epoch_advice(source: SourceNeed) -> Iterator[Advice]:
    if source.epochs_at_end is not None and source.epochs_at_end > 1.5:
        yield Advice(
            f"source {source.name!r} is read {source.epochs_at_end:.2f} times: up to 4 epochs repeats are worth nearly "
            "as much as new text, beyond that little",
            EPOCHS_EVIDENCE,
        )


def _validation_advice(config: RunConfig) -> Iterator[Advice]:
    if not config.data.validation:
        yield Advice("no validation set: nothing will show what was learned or forgotten", "data.validation is empty")
    elif len(config.data.validation) == 1:
        yield Advice(
            "one validation set: name a general one beside that of the domain, or forgetting stays unseen", "I"
        )


def _bubble_advice(config: RunConfig, derived: Derived) -> Iterator[Advice]:
    """Idle time of the pipeline as a share of a step."""
    stages, chunks = config.parallel.pp, config.parallel.vpp or 1
    bubble = (stages - 1) / (derived.gradient_accumulation_steps * chunks)
    if bubble > 0.1:
        yield Advice(
            f"the pipeline stands idle for {bubble / (1 + bubble):.0%} of a step: more micro-batches per step, "
            "parallel.vpp, or fewer stages",
            "(pp - 1) / (micro-batches * vpp), Narayanan et al. 2021, arXiv:2104.04473; P",
        )
