"""What follows from a config: Megatron's numbers out of tokens and ranks, and every cross-field rule.

`derive` reports all problems together, each with a legal value, before any process group starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import broken_rule, plan_ramped_steps, plan_steps
from megatron_cpt.config.layout import divisors, layout_problems, model_problems, stage_layers
from megatron_cpt.config.problems import Problem, raise_problems
from megatron_cpt.config.schema import RunConfig


@dataclass(frozen=True)
class Derived:
    """Numbers that nobody types. Tokens count the whole job, iterations are optimizer steps."""

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
    notes: tuple[str, ...] = field(default=())  # what a careful user would want to be told


def derive(config: RunConfig, arch: Architecture | None = None, origin: str = "config") -> Derived:
    """Check `config` across its fields, and against the model where `arch` is known.

    Raises:
        ConfigError: all broken rules at once.
    """
    problems = [*layout_problems(config), *_budget_problems(config), *_data_problems(config)]
    if arch is not None:
        problems += model_problems(config, arch)
    raise_problems(problems, origin)

    parallel, batch = config.parallel, config.batch
    world_size = parallel.nodes * parallel.gpus_per_node
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    tokens_per_step = batch.global_batch_size * batch.seq_length
    train_iters, train_tokens = planned_steps(config)
    added_tokens = train_tokens - config.budget.train_tokens
    sequence_parallel = parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel
    return Derived(
        world_size=world_size,
        data_parallel_size=dp,
        gradient_accumulation_steps=batch.global_batch_size // (batch.micro_batch_size * dp),
        tokens_per_step=tokens_per_step,
        train_iters=train_iters,
        train_tokens=train_tokens,
        added_tokens=added_tokens,
        warmup_tokens=config.budget.warmup_tokens,
        decay_tokens=decay_tokens(config, train_tokens),
        sequence_parallel=sequence_parallel,
        padded_vocab_size=arch.padded_vocab_size(parallel.tp) if arch else None,
        parameters=arch.num_parameters if arch else None,
        layers_per_stage=stage_layers(parallel, arch.num_layers) if arch else None,
        notes=tuple(_notes(config, added_tokens, train_iters, tokens_per_step)),
    )


def planned_steps(config: RunConfig) -> tuple[int, int]:
    """(optimizer steps, tokens) of the whole budget, the last step made whole."""
    batch = config.batch
    if batch.rampup_from is None or batch.global_batch_size % batch.rampup_from:
        tokens_per_step = batch.global_batch_size * batch.seq_length
        steps = plan_steps(config.budget.train_tokens, tokens_per_step, config.budget.rounding)
        return steps.train_iters, steps.train_tokens
    return plan_ramped_steps(
        config.budget.train_tokens, batch.seq_length, batch.global_batch_size, batch.rampup_from, batch.rampup_tokens
    )


def _rampup_problems(config: RunConfig) -> Iterator[Problem]:
    parallel, batch = config.parallel, config.batch
    if batch.rampup_from is None:
        if batch.rampup_tokens:
            yield Problem(
                "batch.rampup_tokens", batch.rampup_tokens, "means nothing without rampup_from", "set both or none"
            )
        return
    if not batch.rampup_tokens:
        yield Problem("batch.rampup_from", batch.rampup_from, "means nothing without rampup_tokens", "set both or none")
    if batch.global_batch_size % batch.rampup_from:
        yield Problem(
            "batch.rampup_from",
            batch.rampup_from,
            f"must divide global_batch_size = {batch.global_batch_size}",
            f"one of {divisors(batch.global_batch_size)}",
        )
    dp = parallel.nodes * parallel.gpus_per_node // (parallel.tp * parallel.pp * parallel.cp)
    per_round = batch.micro_batch_size * max(1, dp) * (parallel.pp if parallel.vpp else 1)
    if batch.rampup_from % per_round:
        yield Problem(
            "batch.rampup_from",
            batch.rampup_from,
            f"must be a multiple of {per_round} (micro_batch_size x dp, and x pp for the interleaved schedule)",
            f"{per_round}",
        )


def decay_tokens(config: RunConfig, train_tokens: int) -> int:
    """Tokens of the final decay: schedule.decay_tokens or 10 % of the budget where the kind has one of its own."""
    kind, decay = config.schedule.kind, config.schedule.decay_tokens
    if kind in ("wsd", "infinite"):
        return train_tokens // 10 if decay is None else decay
    if kind == "constant":
        return 0
    return train_tokens - config.schedule.start_tokens - config.budget.warmup_tokens


def _budget_problems(config: RunConfig) -> Iterator[Problem]:
    budget, batch, optimizer = config.budget, config.batch, config.optimizer
    tokens_per_step = batch.global_batch_size * batch.seq_length
    if broken := broken_rule(budget.train_tokens, tokens_per_step, budget.rounding):
        yield Problem("budget.train_tokens", budget.train_tokens, *broken)
        return
    yield from _rampup_problems(config)
    train_tokens = planned_steps(config)[1]
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"is above optimizer.lr = {optimizer.lr}",
            f"at most {optimizer.lr}",
        )
    if config.schedule.start_tokens >= train_tokens:
        yield Problem(
            "schedule.start_tokens",
            config.schedule.start_tokens,
            f"is not before the end of the budget, train_tokens = {train_tokens:,}",
            "raise budget.train_tokens: it counts from the start of the run, not from here",
        )
    elif budget.warmup_tokens > train_tokens - config.schedule.start_tokens:
        yield Problem(
            "budget.warmup_tokens",
            budget.warmup_tokens,
            f"exceeds train_tokens = {train_tokens:,}"
            + (
                f" less schedule.start_tokens = {config.schedule.start_tokens:,}"
                if config.schedule.start_tokens
                else ""
            ),
            f"about 1 % of it: {train_tokens // 100:,}",
        )
    else:
        yield from _schedule_problems(config, train_tokens)


def _schedule_problems(config: RunConfig, train_tokens: int) -> Iterator[Problem]:
    schedule, optimizer = config.schedule, config.optimizer
    room = train_tokens - schedule.start_tokens - config.budget.warmup_tokens - schedule.cooldown_tokens
    if schedule.kind in ("wsd", "infinite"):
        if decay_tokens(config, train_tokens) > room:
            yield Problem(
                "schedule.decay_tokens",
                schedule.decay_tokens,
                f"with warmup_tokens = {config.budget.warmup_tokens:,}"
                + (f" and cooldown_tokens = {schedule.cooldown_tokens:,}" if schedule.cooldown_tokens else "")
                + f" exceeds train_tokens = {train_tokens:,}",
                f"at most {max(0, room):,}",
            )
    elif schedule.decay_tokens is not None:
        yield Problem(
            "schedule.decay_tokens",
            schedule.decay_tokens,
            f"means nothing to kind {schedule.kind!r}",
            "leave it out, or schedule.kind: wsd",
        )
    if schedule.kind == "infinite":
        if schedule.constant_lr is None or not optimizer.min_lr <= schedule.constant_lr <= optimizer.lr:
            yield Problem(
                "schedule.constant_lr",
                schedule.constant_lr,
                "kind 'infinite' needs it, between min_lr and lr",
                f"a value from {optimizer.min_lr:g} to {optimizer.lr:g}",
            )
        if optimizer.min_lr == 0:
            yield Problem("optimizer.min_lr", 0.0, "the exponential anneal of 'infinite' never reaches 0", "above 0")
    else:
        for name, value, unset in (
            ("constant_lr", schedule.constant_lr, None),
            ("cooldown_tokens", schedule.cooldown_tokens, 0),
        ):
            if value != unset:
                yield Problem(
                    f"schedule.{name}",
                    value,
                    f"means nothing to kind {schedule.kind!r}",
                    "leave it out, or kind: infinite",
                )
    if schedule.kind == "inverse_sqrt" and config.budget.warmup_tokens == 0:
        yield Problem(
            "budget.warmup_tokens",
            0,
            "is the time scale of kind 'inverse_sqrt', which needs one",
            f"about 1 % of train_tokens: {train_tokens // 100:,}",
        )
    if schedule.warmup_from_lr > optimizer.lr:
        yield Problem(
            "schedule.warmup_from_lr",
            schedule.warmup_from_lr,
            f"is above optimizer.lr = {optimizer.lr}",
            "a lower rate",
        )


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    names = [source.name for source in config.data.train]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("data.train", None, f"two sources are named {name!r}", "give each source its own name")
    best_by, known = config.checkpoint.best_by, list(config.data.validation)
    if best_by is not None and best_by not in known:
        yield Problem(
            "checkpoint.best_by",
            best_by,
            "is not a validation set",
            f"one of {known}" if known else "name held-out sets under data.validation",
        )


def _notes(config: RunConfig, added_tokens: int, train_iters: int, tokens_per_step: int) -> Iterator[str]:
    if added_tokens:
        yield f"{added_tokens:,} tokens are added so that the last step is whole (budget.rounding: up)"
    every = config.checkpoint.save_every
    if every is None or every.in_tokens(tokens_per_step) > train_iters * tokens_per_step:
        yield f"checkpoint.save_every = {every} is longer than the run: only the last step saves"
