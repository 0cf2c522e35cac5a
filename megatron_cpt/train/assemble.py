"""From a checked job and joined process groups to the loop: model, optimizer, newest checkpoint, reports."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.budget import format_count
from megatron_cpt.config.trainable import trainable_of
from megatron_cpt.data.batches import BatchStream
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.validation import ValidationSet
from megatron_cpt.forgetting.ewc import weight_penalties
from megatron_cpt.forgetting.kl import kl_terms
from megatron_cpt.launch.preflight import CheckedRun, branch_point
from megatron_cpt.launch.start import PreparedRun
from megatron_cpt.model.owned_parameters import owned_parameters
from megatron_cpt.runs.folder import RunFolder, count_attempts
from megatron_cpt.runs.lease import Lease
from megatron_cpt.runtime.distributed import Runtime
from megatron_cpt.train.checkpoint import CheckpointManager
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.console_view import ConsoleView, open_console
from megatron_cpt.train.control import Control
from megatron_cpt.train.loop import LoopContext, train
from megatron_cpt.train.metrics import MetricsFile
from megatron_cpt.train.metrics_rows import StepReporter
from megatron_cpt.train.position import Position
from megatron_cpt.train.state import build_train_state, unwrap
from megatron_cpt.train.trackers import open_trackers
from megatron_cpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train_run(
    run: PreparedRun,
    batches: BatchStream,
    runtime: Runtime,
    lease: Lease | None,
    watchdog: Watchdog,
    clock: LapClock,
) -> int:
    """Build everything, continue from the newest sound checkpoint, and train. Return the exit code.

    `clock` has timed the start so far; all of it goes into the row `start` of metrics.jsonl.
    """
    job, config, folder = run.checked, run.checked.config, run.folder
    attempt = _shared_attempt(folder)
    trainable = trainable_of(config, job.arch)
    checkpoints = CheckpointManager(config, folder, attempt, lease, trainable.checkpoint_bytes())
    if run.ledger.tokens:
        _say("checking the files of the newest checkpoint")
    chosen = checkpoints.choose() or branch_point(config)
    held = config.forgetting.active_ewc is not None  # near the base, whose weights are then needed at each start
    read_base = chosen is None or held or not trainable.saves_every_weight
    _say("building the model" + (f", with the weights of {config.model.init_from}" if read_base else ""))
    state = build_train_state(config, job.arch, origin=job.origin, trainable=trainable, read_base=read_base)
    if held:
        owned = owned_parameters([unwrap(chunk) for chunk in state.chunks], state.optimizer)
        state.penalties = weight_penalties(config, job.arch, owned)
    if config.forgetting.runs_reference:
        _say(f"loading the frozen reference {config.model.init_from}")
    terms = kl_terms(config, job.arch, job.origin, job.datasets.train)
    clock.lap("model")
    if chosen is not None:
        _say(f"loading {chosen[0]}")
    position = Position() if chosen is None else checkpoints.load(state, *chosen)
    clock.lap("checkpoint")
    ledger = position.ledger.with_sources(job.datasets.manifests(), config.batch.seq_length)
    position = dataclasses.replace(position, ledger=ledger)
    report = _open_reporter(job, folder, attempt, position.ledger)
    report.event(
        "start",
        position,
        _first_line(job, position, chosen and chosen[0]),
        world_size=runtime.world_size,
        setup_seconds=clock.rounded(),
    )
    minutes = config.failure.wall_time_minutes
    context = LoopContext(
        config,
        job.derived,
        parallel_state.get_data_parallel_rank(),
        job.origin,
        state,
        batches,
        tuple(
            ValidationSet(
                d, config.batch.seq_length, config.eval.tokens, documents_apart=config.model.document_attention
            )
            for d in job.datasets.validation
        ),
        checkpoints,
        Control(folder.root, runtime.device, minutes and 60 * minutes),
        watchdog,
        report,
        terms,
    )
    try:
        return train(context, position)
    finally:
        report.close()


def _say(text: str) -> None:
    """A line of rank 0 to the console: a start takes its time, and should not look dead."""
    if dist.get_rank() == 0:
        logger.info("%s", text)


def _shared_attempt(folder: RunFolder) -> int:
    """Rank 0's count of the attempts of this run, on every rank."""
    numbers = [count_attempts(folder) if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(numbers)
    return numbers[0]


def _open_reporter(job: CheckedRun, folder: RunFolder, attempt: int, ledger: Ledger) -> StepReporter:
    names = [dataset.name for dataset in job.datasets.train]
    if dist.get_rank() != 0:
        return StepReporter(trainable_of(job.config, job.arch), job.derived, names, None, None)
    metrics = MetricsFile(folder.metrics, attempt, open_trackers(job.config, folder))
    view = ConsoleView(open_console(), job.derived.train_tokens, ledger.tokens)
    return StepReporter(trainable_of(job.config, job.arch), job.derived, names, metrics, view)


def _first_line(job: CheckedRun, position: Position, checkpoint: Path | None) -> str:
    tokens = format_count(job.derived.train_tokens)
    if checkpoint is None:
        return f"training {tokens} tokens from {job.config.model.init_from}"
    return f"continuing at {position.ledger.tokens:,} of {tokens} tokens from {checkpoint}"
