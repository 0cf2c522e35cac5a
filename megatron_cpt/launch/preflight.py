"""What a training command asks for, read and checked before any process group exists; no torch."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.budget import format_count
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.load import load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import Datasets, SourcePlan, check_datasets
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.model_dir import architecture_dir
from megatron_cpt.runs.checkpoints import complete_checkpoints, faults, free_bytes
from megatron_cpt.runs.folder import Change, RunFolder
from megatron_cpt.runs.marker import Marker, read_marker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run: its config, its model and its data, all checked."""

    config: RunConfig
    arch: Architecture
    derived: Derived
    datasets: Datasets
    model_dir: Path


def check_job(config_path: Path, overrides: Sequence[str]) -> Job:
    """Read and check everything that can be wrong before a process group exists.

    Raises:
        UserError: the config, the model's files or a dataset.
    """
    config = load_config(config_path, overrides)
    refuse_missing_trackers(config)
    model_dir = architecture_dir(config)
    refuse_instruct_model(config, model_dir)
    arch = read_architecture(model_dir)
    derived = derive(config, arch, origin=str(config_path))
    return Job(config, arch, derived, check_datasets(config, arch, model_dir), model_dir)


def refuse_missing_trackers(config: RunConfig) -> None:
    """Raise ConfigError when a tracker is asked for whose package is not installed."""
    asked = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb_project is not None}
    for package, wanted in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            key = "log.tensorboard" if package == "tensorboard" else "log.wandb_project"
            raise ConfigError(f"{key} needs the package {package}", hint="pip install 'megatron-cpt[trackers]'")


def branch_point(config: RunConfig) -> tuple[Path, Marker] | None:
    """The checkpoint of another run that checkpoint.branch_from names, None when it names none.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    if config.checkpoint.branch_from is None:
        return None
    path = Path(config.checkpoint.branch_from)
    candidates = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if (marker := read_marker(path)) is not None:
        candidates = [(path, marker)]
    if not candidates:
        raise CheckpointError(
            f"checkpoint.branch_from = {str(path)!r} is neither a run folder nor one of its complete checkpoints",
            hint="megatron-cpt checkpoints RUN lists them; weights alone are taken with model.init_from",
        )
    if found := faults(*candidates[0]):
        raise CheckpointError(f"{candidates[0][0]} is damaged: {'; '.join(found[:3])}", hint="branch from another one")
    return candidates[0]


def standing_ledger(job: Job) -> Ledger:
    """The ledger to go on from: of the newest complete checkpoint, of the branch point, or an empty one."""
    newest = complete_checkpoints(RunFolder(Path(job.config.folder)).checkpoints)
    origin = newest[0] if newest else branch_point(job.config)
    ledger = Ledger.from_json(origin[1].ledger) if origin else Ledger()
    return ledger.with_sources(job.datasets.manifests(), job.config.batch.seq_length)


def predicted_checkpoint_bytes(config: RunConfig, arch: Architecture) -> int:
    """Size of a checkpoint: the weights, and fp32 weights and two moments for the optimizer."""
    return arch.num_parameters * ((2 if config.precision.dtype == "bf16" else 4) + 12)


def check_free_space(job: Job) -> None:
    """Raise CheckpointError when the run folder has no room for one checkpoint. Call it once the folder exists."""
    root = RunFolder(Path(job.config.folder)).checkpoints
    needed, free = predicted_checkpoint_bytes(job.config, job.arch), free_bytes(root)
    if free < needed:
        raise CheckpointError(
            f"a checkpoint of this model needs about {needed:,} bytes, {free:,} are free in {root}",
            hint="free some space, or set run_dir to a folder on larger storage",
        )


def announce(job: Job, plans: Sequence[SourcePlan], changes: Sequence[Change]) -> None:
    """Log what is about to be trained, what changed since the last start, and what the data gives."""
    parallel, derived = job.config.parallel, job.derived
    logger.info(
        "%s: %s parameters on %d ranks (TP %d x PP %d x CP %d x DP %d)",
        job.config.job_name,
        f"{job.arch.num_parameters:,}",
        derived.world_size,
        parallel.tp,
        parallel.pp,
        parallel.cp,
        derived.data_parallel_size,
    )
    logger.info(
        "%s tokens = %s steps of %s tokens, %d micro-batches per step and rank",
        format_count(derived.train_tokens),
        f"{derived.train_iters:,}",
        f"{derived.tokens_per_step:,}",
        derived.gradient_accumulation_steps,
    )
    for note in derived.notes:
        logger.info("note: %s", note)
    for change in changes:
        logger.info("changed since the last start: %s", change)
    for plan in plans:
        logger.info(
            "source %s: %s tokens needed, an epoch has %s; %.2f epochs at the end",
            plan.name,
            format_count(plan.needed_tokens),
            format_count(plan.available_tokens),
            plan.epochs_at_end,
        )


def index_cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.folder) / "index_cache"
