"""What follows from a config: Megatron's numbers out of tokens and ranks, and every rule across its fields.

`derive` reports all problems together, each with a legal value, before any process group starts. The rules are
the sections' own (`Section.problems`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.phases import phase_problems
from megatron_cpt.config.problems import Problem, raise_problems
from megatron_cpt.config.run_config import RunConfig


@dataclass(frozen=True)
class Derived:
    """Numbers that nobody types. Tokens count the whole job, iterations are optimizer steps.

    `train_iters` never steers the loop, which ends by tokens: a batch size changed on the way changes the number of
    iterations, not the budget. It is there for people and for log lines.
    """

    world_size: int
    data_parallel_size: int
    gradient_accumulation_steps: int  # micro-batches per optimizer step and data-parallel rank
    tokens_per_step: int
    train_iters: int
    train_tokens: int  # what will be trained: train_iters whole steps
    added_tokens: int  # of them, added by rounding the request up
    warmup_tokens: int
    decay_tokens: int  # of the final decay: wsd's own, or all after the warm-up
    sequence_parallel: bool
    padded_vocab_size: int | None  # None while the architecture is unknown
    parameters: int | None
    layers_per_stage: tuple[int, ...] | None  # of each pipeline stage
    notes: tuple[str, ...] = ()  # what a careful user would want to be told


def derive(config: RunConfig, arch: Architecture | None = None, origin: str = "config") -> Derived:
    """Check `config` across its fields, and against the model where `arch` is known.

    Raises:
        ConfigError: all broken rules at once.
    """
    raise_problems(broken_rules(config, arch), origin)
    parallel, batch, steps = config.parallel, config.batch, config.steps()
    return Derived(
        world_size=parallel.world_size,
        data_parallel_size=parallel.data_parallel_size,
        gradient_accumulation_steps=batch.global_batch_size // (batch.micro_batch_size * parallel.data_parallel_size),
        tokens_per_step=batch.global_batch_size * batch.seq_length,
        train_iters=steps.train_iters,
        train_tokens=steps.train_tokens,
        added_tokens=steps.added_tokens,
        warmup_tokens=config.budget.warmup_tokens,
        decay_tokens=config.schedule.final_decay_tokens(steps.train_tokens, config.budget.warmup_tokens),
        sequence_parallel=parallel.uses_sequence_parallel,
        padded_vocab_size=arch.padded_vocab_size(parallel.tp) if arch else None,
        parameters=arch.num_parameters if arch else None,
        layers_per_stage=parallel.layers_per_stage(arch.num_layers) if arch else None,
        notes=tuple(_notes(config)),
    )


def broken_rules(config: RunConfig, arch: Architecture | None = None) -> list[Problem]:
    """Return every rule across the fields that `config` breaks, those of the model where `arch` is known."""
    run = config.sections
    return [*(problem for section in run for problem in section.problems(run, arch)), *phase_problems(config)]


def _notes(config: RunConfig) -> Iterator[str]:
    steps, batch, every = config.steps(), config.batch, config.checkpoint.save_every
    if steps.added_tokens:
        yield f"{steps.added_tokens:,} tokens are added so that the last step is whole (budget.rounding: up)"
    tokens_per_step = batch.global_batch_size * batch.seq_length
    if every is not None and every.in_tokens(tokens_per_step) > steps.train_iters * tokens_per_step:
        yield f"checkpoint.save_every = {every} is longer than the run: only the last step saves"
