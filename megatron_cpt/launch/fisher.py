"""Fisher values on disk: of which model they are, and whether a run may use them. No torch.

DIR/                     a torch_dist checkpoint of the model's shape, fp32, its keys behind `fisher.`
    fisher.json          the record, written last: without it the folder does not count
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import Dataset, check_dataset, model_fingerprint
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.launch.engine import check_engine
from megatron_cpt.launch.environment import refuse_broken_environment
from megatron_cpt.launch.identity import Identity, identity_of, weights_fingerprint
from megatron_cpt.launch.origin import Origin, resolve_origin, side_files_dir
from megatron_cpt.launch.preflight import CheckedRun, check_weights

RECORD = "fisher.json"
FORMAT = 1


@dataclass(frozen=True)
class FisherRecord:
    """What Fisher values were estimated of, and from what."""

    model: dict[str, Any]  # architecture, tokenizer and weights, as `launch.identity.Identity` has them
    data: str  # prefix of the dataset
    data_hash: str
    samples: int
    tokens: int
    seq_length: int
    seed: int
    created: str
    versions: dict[str, str]
    file_bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class FisherJob:
    """An estimate that can start."""

    config: RunConfig
    arch: Architecture
    origin: Origin
    identity: Identity
    dataset: Dataset
    samples: int
    folder: Path


def check_fisher_job(config: RunConfig, named: str, data: str, samples: int, folder: Path) -> FisherJob:
    """Check everything that can be wrong before a process group exists. `named` says in errors where `config` is from.

    Raises:
        UserError: this environment, the config, the model, the dataset, or a folder that is there already.
    """
    refuse_broken_environment()
    check_engine()
    if (folder / RECORD).is_file():
        raise CheckpointError(f"{folder} holds Fisher values already", hint="give another folder, or remove this one")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty", hint="give a folder that does not exist")
    side_files, origin = side_files_dir(config.model), resolve_origin(config.model.init_from)
    arch = read_architecture(side_files, config.model.rope_change)
    derive(config, arch, origin=named)
    if origin.kind == "missing":
        raise ConfigError(
            f"model.init_from = {config.model.init_from!r} does not exist",
            hint="name a Hugging Face directory, a torch_dist checkpoint or a run folder, or `random`",
        )
    check_weights(config, origin)
    dataset = check_dataset("--data", data, config, arch, model_fingerprint(side_files))
    blocks = (dataset.tokens - 1) // config.batch.seq_length
    if blocks < samples:
        raise ConfigError(
            f"{data} has {dataset.tokens:,} tokens, which make {blocks:,} samples of {config.batch.seq_length:,}",
            hint=f"--samples {blocks}" if blocks else "give more text, or a smaller batch.seq_length",
        )
    return FisherJob(config, arch, origin, base_identity(config, origin), dataset, samples, folder)


def base_identity(config: RunConfig, origin: Origin) -> Identity:
    """Return the identity of a run's base model, whose weights may be of any kind."""
    weights = f"random {config.seed}" if origin.kind == "random" else weights_fingerprint(origin.weights)
    return dataclasses.replace(
        identity_of(side_files_dir(config.model), rope=config.model.rope_change), weights=weights
    )


def check_fisher(run: CheckedRun) -> None:
    """Check that the Fisher values of forgetting.ewc are whole and of the run's base model.

    Raises:
        ConfigError: there are none where the config says, or they are of another model.
        CheckpointError: they are damaged.
    """
    asked = run.config.forgetting.active_ewc
    if asked is None or asked.folder is None:
        return
    record = read_fisher(asked.folder)
    if run.origin.kind == "missing":
        return  # check_reference says so
    here = base_identity(run.config, run.origin)
    if changes := Identity(**record.model).differences(here):
        listed = "\n".join(f"  {change}" for change in changes)
        raise ConfigError(
            f"forgetting.ewc.fisher = {str(asked.folder)!r} was estimated of another model than model.init_from = "
            f"{run.config.model.init_from!r}; it differs in\n{listed}",
            hint="estimate it for this model with `megatron-cpt fisher`; the same weights in another format count as "
            "others",
        )


def read_fisher(folder: Path) -> FisherRecord:
    """Return the record of Fisher values whose files are all there.

    Raises:
        ConfigError: there are none.
        CheckpointError: the record or a file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        what = "holds no finished Fisher values" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"forgetting.ewc.fisher = {str(folder)!r} {what}",
            hint=f"megatron-cpt fisher CONFIG --data PREFIX --to {folder}; `fisher: ones` does without",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, and this version reads {FORMAT}")
        record = FisherRecord(**raw)
        Identity(**record.model)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"cannot use {path}: {error}", hint="estimate it again with `megatron-cpt fisher`"
        ) from error
    for name, size in record.file_bytes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise CheckpointError(
                f"{folder / name} {state}",
                hint="copy the folder again, or estimate it again with `megatron-cpt fisher`",
            )
    return record
