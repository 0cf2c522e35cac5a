"""What a training command asks for, read and checked before any process group exists; no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from checkpoint_convert.checkpoint import as_checkpoint_error
from checkpoint_convert.hf import read_hf
from checkpoint_convert.megatron_config import check_facts, refuse_other_models, stores_gammas_less_one
from checkpoint_convert.stored_model import read_stored_models
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import trainable_of
from megatron_cpt.data.datasets import Datasets, check_datasets
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.phase_budgets import with_token_budgets
from megatron_cpt.errors import CheckpointError, ConfigError, ConversionError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.engine import check_engine
from megatron_cpt.launch.environment import refuse_broken_environment
from megatron_cpt.launch.origin import Origin, base_model, model_dir, resolve_origin, run_architecture
from megatron_cpt.runs.checkpoints import complete_checkpoints, faults, free_bytes
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.marker import Marker, read_marker


@dataclass(frozen=True)
class CheckedRun:
    """A run that can start: its config, its model and its data, all checked."""

    config: RunConfig
    arch: Architecture
    derived: Derived
    datasets: Datasets
    origin: Origin
    model_dir: Path  # config.json and tokenizer

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.folder))


def check_run(config: RunConfig, named: str) -> CheckedRun:
    """Check everything that can be wrong before a process group exists. `named` says in errors where `config` is from.

    Raises:
        UserError: this environment, Megatron-Core, the config, the model's files or a dataset.
    """
    refuse_broken_environment()
    check_engine()
    refuse_missing_log_packages(config)
    config = with_token_budgets(config)
    origin, folder = resolve_origin(config.model.init_from), model_dir(config)
    refuse_instruct_model(config, folder)
    arch = run_architecture(config)
    derived = derive(config, arch, origin=named)
    return CheckedRun(config, arch, derived, check_datasets(config, arch, folder), origin, folder)


def refuse_missing_log_packages(config: RunConfig) -> None:
    """Raise ConfigError when trackers or a report are asked for whose packages are not installed."""
    asked = {
        ("tensorboard", "log.tensorboard"): config.log.tensorboard,
        ("wandb", "log.wandb_project"): config.log.wandb_project is not None,
        ("mlflow", "log.mlflow_experiment"): config.log.mlflow_experiment is not None,
        ("trackio", "log.trackio_project"): config.log.trackio_project is not None,
        ("matplotlib", "log.report"): config.log.report,
    }
    missing = {key: name for (name, key), wanted in asked.items() if wanted and importlib.util.find_spec(name) is None}
    if missing:
        needs = ", ".join(f"{key} needs the package {package}" for key, package in missing.items())
        extras = sorted({"plots" if package == "matplotlib" else "trackers" for package in missing.values()})
        raise ConfigError(f"{needs}, not installed here", hint=f"pip install 'megatron-cpt[{','.join(extras)}]'")


def check_weights(config: RunConfig, origin: Origin) -> None:
    """Check what the first weights say of their model against its config.json.

    Of a Hugging Face folder the headers: half a model cannot start. Of a Megatron checkpoint the arguments that were
    stored beside the weights: names and shapes do not show all that Megatron-LM trained with.

    Raises:
        CheckpointError: a shard or a tensor is missing, surplus, misshapen or cut off; another model was trained.
    """
    folder, arch = base_model(config)
    with as_checkpoint_error(origin.weights):
        if origin.kind == "hf":
            read_hf(origin.weights, arch)
        elif origin.kind == "torch_dist":
            stored = read_stored_models(origin.weights)
            refuse_other_models(stored, arch)
            check_facts(stored, arch, folder / "config.json")
            if stores_gammas_less_one(stored):
                raise ConversionError(
                    f"{origin.weights} stores the gammas of norms minus 1 (apply_layernorm_1p)",
                    hint=f"megatron-cpt convert {origin.weights} DIR --to hf, then set model.init_from: DIR",
                )


def check_reference(run: CheckedRun) -> None:
    """Check that the base model of forgetting.kl and ewc can be read: at each start, not at the first only.

    Raises:
        ConfigError: its weights are gone.
        CheckpointError: they are not whole.
    """
    forgetting = run.config.forgetting
    if not forgetting.runs_reference and forgetting.active_ewc is None:
        return
    if run.origin.kind == "missing":
        asking = "kl" if forgetting.runs_reference else "ewc"
        raise ConfigError(
            f"forgetting.{asking} compares with the weights of model.init_from = {run.config.model.init_from!r}, which "
            "does not exist",
            hint=f"bring the base model back, or set model.init_from to where it is now; forgetting.{asking}: null "
            "goes on without it",
        )
    check_weights(run.config, run.origin)


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


def standing_ledger(run: CheckedRun) -> Ledger:
    """The ledger to go on from: of the newest complete checkpoint, of the branch point, or an empty one."""
    newest = complete_checkpoints(run.folder.checkpoints)
    start = newest[0] if newest else branch_point(run.config)
    ledger = Ledger.from_json(start[1].ledger) if start else Ledger()
    return ledger.with_sources(run.datasets.manifests(), run.config.batch.seq_length)


def check_free_space(run: CheckedRun) -> None:
    """Raise CheckpointError when the storage of the run folder, which need not exist, has no room for a checkpoint."""
    root = run.folder.checkpoints.absolute()
    existing = next(path for path in (root, *root.parents) if path.is_dir())
    needed, free = trainable_of(run.config, run.arch).checkpoint_bytes(), free_bytes(existing)
    if free < needed:
        raise CheckpointError(
            f"a checkpoint of this model needs about {needed:,} bytes, {free:,} are free in {existing}",
            hint="free some space, or set run_dir to a folder on larger storage",
        )


def index_cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.folder) / "index_cache"
