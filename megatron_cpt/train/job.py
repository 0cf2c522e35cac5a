"""What a training command asks for, read and checked before any process group exists; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint_convert.families import read_architecture
from megatron_cpt.config.architecture import Architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.load import load_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.sources import Datasets, check_datasets
from megatron_cpt.errors import CheckpointError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.model_dir import architecture_dir
from megatron_cpt.launch.run_folder import RunFolder
from megatron_cpt.train.checkpoint_folder import Marker, complete_checkpoints, faults, read_marker
from megatron_cpt.train.trackers import check_trackers


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
    check_trackers(config)
    model_dir = architecture_dir(config)
    refuse_instruct_model(config, model_dir)
    arch = read_architecture(model_dir)
    derived = derive(config, arch, origin=str(config_path))
    return Job(config, arch, derived, check_datasets(config, arch, model_dir), model_dir)


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


def index_cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.folder) / "index_cache"
