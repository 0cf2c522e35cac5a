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
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.model_dir import architecture_dir
from megatron_cpt.launch.run_folder import RunFolder
from megatron_cpt.train.checkpoint_folder import complete_checkpoints


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
    model_dir = architecture_dir(config)
    refuse_instruct_model(config, model_dir)
    arch = read_architecture(model_dir)
    derived = derive(config, arch, origin=str(config_path))
    return Job(config, arch, derived, check_datasets(config, arch, model_dir), model_dir)


def standing_ledger(job: Job) -> Ledger:
    """The ledger from which the run would go on: the newest complete checkpoint's, or an empty one."""
    newest = complete_checkpoints(RunFolder(Path(job.config.folder)).checkpoints)
    ledger = Ledger.from_json(newest[0][1].ledger) if newest else Ledger()
    return ledger.with_sources(job.datasets.manifests(), job.config.batch.seq_length)


def index_cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.folder) / "index_cache"
