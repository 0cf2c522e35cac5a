"""The training loop: what always happens, in order. Every line runs on every rank."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.config.derive import Derived
from megatron_cpt.config.phase import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.batches import BatchStream
from megatron_cpt.data.validation import ValidationSet
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FINISHED, STOPPED
from megatron_cpt.train.checkpoint import CheckpointManager, SaveFailed
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.control import Control
from megatron_cpt.train.metrics_rows import Reporter
from megatron_cpt.train.position import Progress
from megatron_cpt.train.schedule import learning_rate
from megatron_cpt.train.start_checks import check_start
from megatron_cpt.train.state import TrainState
from megatron_cpt.train.step import evaluate_step, train_step
from megatron_cpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything the loop works with, on this rank."""

    config: RunConfig
    derived: Derived
    dp_rank: int
    state: TrainState
    batches: BatchStream
    validation: tuple[ValidationSet, ...]
    checkpoints: CheckpointManager
    control: Control
    watchdog: Watchdog
    report: Reporter


def train(run: Run, progress: Progress) -> int:
    """Train from `progress` to the end of the budget, or until asked to stop; the exit code."""
    config, derived, state, failure = run.config, run.derived, run.state, run.config.failure
    micro, dp = config.batch.micro_batch_size, derived.data_parallel_size
    if progress.iteration == 0:
        first = run.batches.plan_step(progress.ledger, phase_at(config).batch_size.at(0))
        check_start(state, next(run.batches.micro_batches(first, micro, run.dp_rank, dp)))
        progress = evaluate(run, progress)
    while progress.ledger.tokens < config.budget.train_tokens:  # whole steps from where the run stands
        run.watchdog.enter("step")
        clock = LapClock()
        before = progress.ledger.tokens
        phase = phase_at(config, before)
        plan = run.batches.plan_step(progress.ledger, phase.batch_size.at(before))
        batches = list(run.batches.micro_batches(plan, micro, run.dp_rank, dp))
        clock.lap("data")

        lr = learning_rate(phase, (before + plan.ledger.tokens) / 2)
        set_rates(state.optimizer, lr, config.optimizer.weight_decay)
        guard, sources = progress.guard, len(run.batches.streams)
        accept = partial(guard.accepts, failure)
        result = train_step(state, iter(batches), len(batches), num_sources=sources, accept=accept)
        progress = progress.after_step(plan.ledger, result.loss, result.skipped, failure)
        clock.lap("compute")

        after = progress.ledger.tokens
        position = {"before_tokens": before, "after_tokens": after, "iteration": progress.iteration}
        last = after >= config.budget.train_tokens
        request = run.control.agree()
        finish_save(run, progress)
        clock.lap("other")

        show = last or config.log.every.due(**position)
        run.report.step(progress, result, lr, after - before, len(plan.samples), clock, show)
        if result.skipped:
            why = guard.verdict(failure, result.loss, result.grad_norm)
            run.report.skipped(progress, f"step skipped: {why}", run.batches.documents(plan))
        if progress.guard.must_roll_back(failure):
            rolled_back = roll_back(run, progress)
            if rolled_back is None:
                return DO_NOT_RESTART
            progress = rolled_back
        if request.kill:
            run.report.event("killed", progress, f"stopping without saving: {request.reason}")
            return DO_NOT_RESTART
        if last or (config.eval.every is not None and config.eval.every.due(**position)):
            progress = evaluate(run, progress)
        save_due = config.checkpoint.save_every is not None and config.checkpoint.save_every.due(**position)
        if last or save_due or request.save or request.stop:
            save(run, progress, wait=last or request.stop)
        if request.stop and not last:
            run.report.event("stopped", progress, f"stopping after {request.reason}; start again to continue")
            return STOPPED
    run.report.event("finished", progress, f"finished: {progress.ledger.tokens:,} tokens trained")
    return FINISHED


def save(run: Run, progress: Progress, *, wait: bool) -> None:
    """Save; a failure is fatal only for the save that the run's end waits for."""
    with run.watchdog.during("save"):
        finish_save(run, progress, wait=True)
        started = time.perf_counter()
        try:
            run.checkpoints.save(run.state, progress, wait=wait)
            run.report.event("save", progress, "", blocked_seconds=round(time.perf_counter() - started, 4))
        except SaveFailed as error:
            if wait:
                raise
            run.report.event("save_failed", progress, f"{error}; training goes on", reason=error.message)


def finish_save(run: Run, progress: Progress, *, wait: bool = False) -> None:
    """Make the save that is being written count once all ranks have written it; report what became of it."""
    try:
        if run.checkpoints.poll(wait=wait):
            run.report.event("saved", progress, "", checkpoint_iteration=run.checkpoints.last_saved)
    except SaveFailed as error:
        run.report.event("save_failed", progress, f"{error}; training goes on", reason=error.message)


def roll_back(run: Run, progress: Progress) -> Progress | None:
    """Weights and optimizer of the last checkpoint before the skipped steps; the data goes on behind them.

    None when there is no such checkpoint or the run has rolled back too often: a person must look.
    """
    failure, guard = run.config.failure, progress.guard
    with run.watchdog.during("save"):
        finish_save(run, progress, wait=True)
        chosen = run.checkpoints.newest_before(progress.iteration - guard.skips_in_row)
        if chosen is None or guard.rollbacks >= failure.max_rollbacks:
            why = "no checkpoint to go back to" if chosen is None else f"rolled back {guard.rollbacks} times already"
            run.report.event("diverged", progress, f"{guard.skips_in_row} steps in a row skipped, {why}: stopping")
            return None
        earlier = run.checkpoints.load(run.state, *chosen)
    run.report.event(
        "rolled_back",
        progress,
        f"{guard.skips_in_row} steps in a row skipped: back to the weights of {chosen[0]}",
        checkpoint_iteration=earlier.iteration,
    )
    return replace(progress, guard=guard.rolled_back_to(earlier.guard))


def evaluate(run: Run, progress: Progress) -> Progress:
    """Exact token-weighted loss on every validation set; the progress with the losses."""
    micro, dp = run.config.batch.micro_batch_size, run.derived.data_parallel_size
    losses = dict(progress.validation)
    for held_out in run.validation:
        run.watchdog.enter("eval")
        started = time.perf_counter()
        loss_sum, tokens = evaluate_step(run.state, held_out.micro_batches(micro, run.dp_rank, dp))
        assert tokens == held_out.predicted_tokens, (held_out.name, tokens, held_out.predicted_tokens)
        losses[held_out.name] = loss_sum / tokens
        run.report.validation(progress, held_out.name, losses[held_out.name], tokens, time.perf_counter() - started)
    return replace(progress, validation=losses)


def set_rates(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Rates of this step; norms and biases have multipliers that keep them from decaying."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
