"""The training loop: what always happens, in order. Every line runs on every rank."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.config.derive import Derived
from megatron_cpt.config.learning_rate import learning_rate
from megatron_cpt.config.phases import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.batches import BatchStream
from megatron_cpt.data.validation import ValidationSet
from megatron_cpt.launch.origin import Origin
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FINISHED, STOPPED
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.checkpoint import CheckpointManager
from megatron_cpt.train.checkpoint_errors import SaveFailed
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.control import Control
from megatron_cpt.train.metrics_rows import StepRecord, StepReporter
from megatron_cpt.train.position import Position
from megatron_cpt.train.start_checks import check_start
from megatron_cpt.train.state import TrainState
from megatron_cpt.train.step import evaluate_step, train_step
from megatron_cpt.train.terms import LossTerm
from megatron_cpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopContext:
    """Everything the loop works with, on this rank."""

    config: RunConfig
    derived: Derived
    dp_rank: int
    origin: Origin  # of the weights, when no checkpoint set them
    state: TrainState
    batches: BatchStream
    validation: tuple[ValidationSet, ...]
    checkpoints: CheckpointManager
    control: Control
    watchdog: Watchdog
    report: StepReporter
    terms: tuple[LossTerm, ...] = ()


def train(run: LoopContext, position: Position) -> int:
    """Train from `position` to the end of the budget, or until asked to stop. Return the exit code."""
    config, derived, state, failure = run.config, run.derived, run.state, run.config.failure
    micro, dp = config.batch.micro_batch_size, derived.data_parallel_size
    if position.iteration == 0:
        first = run.batches.plan_step(position.ledger, phase_at(config))
        check_start(state, next(run.batches.micro_batches(first, micro, run.dp_rank, dp)), run.origin)
        position = evaluate(run, position)
    entered = ""
    while position.ledger.tokens < config.budget.train_tokens:  # whole steps from where the run stands
        run.watchdog.enter("step")
        clock = LapClock()
        before = position.ledger.tokens
        phase = phase_at(config, before)
        if phase.name != entered:
            entered = phase.name
            run.report.event("phase", position, f"phase {entered}, to {phase.end_tokens:,} tokens", phase=entered)
        plan = run.batches.plan_step(position.ledger, phase)
        micro_batches = list(run.batches.micro_batches(plan, micro, run.dp_rank, dp))
        clock.lap("data")

        middle = (before + plan.ledger.tokens) / 2
        lr = learning_rate(phase, middle) * position.gate.rate_factor
        set_rates(state.optimizer, lr, config.optimizer.weight_decay)
        refuse, sources = partial(position.guard.verdict, failure), len(run.batches.streams)
        result = train_step(state, micro_batches, num_sources=sources, terms=run.terms, refuse=refuse)
        position = position.after_step(plan.ledger, result.loss, result.refused is not None, failure)
        clock.lap("compute")

        after = position.ledger.tokens
        passed = {"before_tokens": before, "after_tokens": after, "iteration": position.iteration}
        last, phase_ends = after >= config.budget.train_tokens, after >= phase.end_tokens
        request = run.control.agree()
        finish_save(run, position)
        clock.lap("other")

        show = last or config.log.every.due(**passed)
        run.report.step(StepRecord(position, result, lr, plan, phase.name, clock, show))
        if result.refused is not None:
            run.report.skipped(position, f"step skipped: {result.refused}", run.batches.documents(plan))
        if position.guard.must_roll_back(failure):
            rolled_back = roll_back(run, position)
            if rolled_back is None:
                return DO_NOT_RESTART
            position = rolled_back
        if request.kill:
            text = f"stopping without saving: {request.reason}"
            run.report.event("killed", position, text, reason=request.reason)
            return DO_NOT_RESTART
        best = False
        if phase_ends or (config.eval.every is not None and config.eval.every.due(**passed)):
            admitted = pass_gate(run, evaluate(run, position))
            if admitted is None:
                return DO_NOT_RESTART
            position, best = admitted
        save_due = best or (config.checkpoint.save_every is not None and config.checkpoint.save_every.due(**passed))
        stops = phase.stops and phase_ends
        if phase_ends or save_due or request.save or request.stop:
            save(run, position, wait=last or stops or request.stop)
        if stops:
            text = f"phase {phase.name} is done and saved; start again to begin the next one"
            run.report.event("stopped", position, text, reason=f"the end of phase {phase.name}", by_person=True)
            return STOPPED
        if request.stop and not last:
            text = f"stopping after {request.reason}; start again to continue"
            run.report.event("stopped", position, text, reason=request.reason, by_person=request.by_person)
            return STOPPED
    run.report.event("finished", position, f"finished: {position.ledger.tokens:,} tokens trained")
    return FINISHED


def save(run: LoopContext, position: Position, *, wait: bool) -> None:
    """Save; a failure is fatal only for the save that the end of the run waits for."""
    with run.watchdog.during("save"):
        finish_save(run, position, wait=True)
        started = time.perf_counter()
        try:
            run.checkpoints.save(run.state, position, wait=wait)
            run.report.event("save", position, "", blocked_seconds=round(time.perf_counter() - started, 4))
        except SaveFailed as error:
            if wait:
                raise
            run.report.event("save_failed", position, f"{error}; training goes on", reason=error.message)


def finish_save(run: LoopContext, position: Position, *, wait: bool = False) -> None:
    """Complete the save that is being written once all ranks have written it, and report how it ended."""
    try:
        if run.checkpoints.poll(wait=wait):
            run.report.event("saved", position, "", checkpoint_iteration=run.checkpoints.last_saved)
    except SaveFailed as error:
        run.report.event("save_failed", position, f"{error}; training goes on", reason=error.message)


def roll_back(run: LoopContext, position: Position) -> Position | None:
    """Load weights and optimizer of the last checkpoint before the skipped steps; the data goes on after them.

    Return None when there is no such checkpoint or the run has rolled back too often: a person must look.
    """
    failure, guard = run.config.failure, position.guard
    with run.watchdog.during("save"):
        finish_save(run, position, wait=True)
        chosen = run.checkpoints.newest_before(position.iteration - guard.skips_in_row)
        if chosen is None or guard.rollbacks >= failure.max_rollbacks:
            why = "no checkpoint to go back to" if chosen is None else f"rolled back {guard.rollbacks} times already"
            reason = f"{guard.skips_in_row} steps in a row skipped, {why}"
            run.report.event("diverged", position, f"{reason}: stopping", reason=reason)
            return None
        earlier = run.checkpoints.load(run.state, *chosen)
    run.report.event(
        "rolled_back",
        position,
        f"{guard.skips_in_row} steps in a row skipped: back to the weights of {chosen[0]}",
        checkpoint_iteration=earlier.iteration,
    )
    return position.remembering(guard=guard.rolled_back_to(earlier.guard))


def pass_gate(run: LoopContext, position: Position) -> tuple[Position, bool] | None:
    """Do what forgetting.gate says of the validation at `position`.

    Return where the run goes on and whether a gate that may go back there wants it saved as the best so far. None when
    the run must stop, saved and reported.
    """
    asked, gate = run.config.forgetting.gate, position.gate
    if asked is None or asked.action == "warn":
        return position, False
    if gate.within:
        return position, asked.action == "roll_back" and run.checkpoints.would_be_best(position)
    why = "forgetting.gate.action is stop"
    if asked.action == "roll_back":
        with run.watchdog.during("save"):
            finish_save(run, position, wait=True)
            chosen = run.checkpoints.best() if gate.rollbacks < asked.max_rollbacks else None
            if chosen is not None:
                return _back_to_best(run, position, chosen), False
        tired = gate.rollbacks >= asked.max_rollbacks
        why = f"gone back {gate.rollbacks} times already" if tired else "there is no checkpoint within the limit"
    save(run, position, wait=True)
    reason = f"general text beyond forgetting.gate, {why}"
    run.report.event("diverged", position, f"{reason}: stopping", reason=reason)
    return None


def _back_to_best(run: LoopContext, position: Position, chosen: tuple[Path, Marker]) -> Position:
    """Load weights and optimizer of the best checkpoint; the data goes on, at a lower rate."""
    asked = run.config.forgetting.gate
    assert asked is not None
    earlier = run.checkpoints.load(run.state, *chosen)
    gate = position.gate.rolled_back(asked)
    run.report.event(
        "rolled_back",
        position,
        f"back to the weights of {chosen[0]}, the best within the limit; learning rate x {gate.rate_factor:g}",
        checkpoint_iteration=earlier.iteration,
        rate_factor=gate.rate_factor,
    )
    guard = replace(earlier.guard, rollbacks=position.guard.rollbacks)
    return replace(position, validation=earlier.validation).remembering(guard=guard, gate=gate)


def evaluate(run: LoopContext, position: Position) -> Position:
    """Measure the token-weighted loss of every validation set. Return the position with the losses."""
    micro, dp = run.config.batch.micro_batch_size, run.derived.data_parallel_size
    losses = dict(position.validation)
    for held_out in run.validation:
        run.watchdog.enter("eval")
        started = time.perf_counter()
        run.report.validating(position, held_out.name)
        micro_batches = held_out.micro_batches(micro, run.dp_rank, dp)
        loss_sum, tokens = evaluate_step(run.state, micro_batches, on_progress=run.report.validation_progress)
        assert tokens == held_out.predicted_tokens, (held_out.name, tokens, held_out.predicted_tokens)
        losses[held_out.name] = loss_sum / tokens
        run.report.validation(position, held_out.name, losses[held_out.name], tokens, time.perf_counter() - started)
    return _judged(run, replace(position, validation=losses))


def _judged(run: LoopContext, position: Position) -> Position:
    """Let forgetting.gate judge the validation at `position`, and report what it says."""
    if (asked := run.config.forgetting.gate) is None:
        return position
    gate, judgement = position.gate.after(asked, position.validation)
    text = "" if judgement.within else f"forgetting gate: {judgement.describe()}"
    run.report.event(
        "gate",
        position,
        text,
        perplexity_increases=dict(judgement.increases),
        limit=judgement.limit,
        within=judgement.within,
        rate_factor=gate.rate_factor,
    )
    return position.remembering(gate=gate)


def set_rates(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set the rates of this step; norms and biases have multipliers that keep them from decaying."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
