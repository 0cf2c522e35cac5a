"""What `model.init_from` means: where the first weights come from, and where the model's config.json and tokenizer lie.

A folder may be a Hugging Face model, one torch_dist checkpoint, or the folder of a run, whose newest complete
checkpoint is meant. A run that has started keeps its own copy of the side files in RUN/hf and needs the folder only as
long as it has no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.model import ModelConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.runs.adapters import refuse_adapters
from megatron_cpt.runs.checkpoints import complete_checkpoints

# a model directory, a converted checkpoint, a run folder: where each keeps the Hugging Face side files
_CANDIDATES = (".", "hf", "../hf", "../../hf")


@dataclass(frozen=True)
class Origin:
    """Where a run's first weights come from."""

    kind: Literal["random", "hf", "torch_dist", "missing"]
    weights: Path  # of no meaning for `random`; for `missing` the folder that is not there


def resolve_origin(init_from: str) -> Origin:
    """The weights that `model.init_from` names.

    Raises:
        CheckpointError: it is a run folder with a checkpoint whose marker cannot be understood, or that holds
            adapters alone.
    """
    path = Path(init_from)
    if init_from == "random":
        return Origin("random", path)
    refuse_adapters(path)
    if newest := complete_checkpoints(path / "checkpoints"):
        refuse_adapters(newest[0][0])
        return Origin("torch_dist", newest[0][0])
    if (path / ".metadata").is_file() and (path / "metadata.json").is_file():
        return Origin("torch_dist", path)
    return Origin("hf" if path.exists() else "missing", path)


def side_files_dir(model: ModelConfig) -> Path:
    """The directory with the config.json that describes the model, its tokenizer and generation config.

    Raises:
        ConfigError: there is none; the message says where it was looked for.
        CheckpointError: it holds adapters alone.
    """
    if model.architecture is not None:
        path = Path(model.architecture)
        path = path.parent if path.name == "config.json" else path
        if (path / "config.json").is_file():
            return path
        raise ConfigError(
            f"model.architecture = {model.architecture!r}: there is no {path / 'config.json'}",
            hint="name a directory that holds a Hugging Face config.json",
        )
    if model.init_from == "random":
        raise ConfigError(
            "model.init_from = 'random' says nothing of the model's shape",
            hint="set model.architecture to a directory that holds a Hugging Face config.json",
        )
    start = Path(model.init_from)
    refuse_adapters(start)
    for candidate in _CANDIDATES:
        if (start / candidate / "config.json").is_file():
            return (start / candidate).resolve()
    what = "holds no config.json" if start.exists() else "does not exist"
    raise ConfigError(
        f"model.init_from = {model.init_from!r} {what}",
        hint="name a Hugging Face directory, a torch_dist checkpoint or a run folder; to plan a job whose weights are "
        "on another machine, set model.architecture to a copy of its config.json",
    )


def base_model(config: RunConfig) -> tuple[Path, Architecture]:
    """The directory of the base model's config.json, and what it says: `model.rope` is not in it.

    Where the base is gone these are the run's own.

    Raises:
        ConfigError: there is none, or it cannot be understood.
    """
    try:
        folder = side_files_dir(config.model)
    except ConfigError:
        folder = model_dir(config)
    return folder, read_architecture(folder)


def run_architecture(config: RunConfig) -> Architecture:
    """The model that the run trains: that of config.json, with the positions of `model.rope`.

    Raises:
        ConfigError: there is no config.json, or `model.rope` does not fit it.
        ConversionError: it is not understood.
    """
    folder = model_dir(config)
    own = folder == Path(config.folder) / "hf"  # in which model.rope is written already
    return read_architecture(folder, None if own else config.model.rope_change)


def model_dir(config: RunConfig) -> Path:
    """Where a run reads config.json and tokenizer: its own copy once it has a checkpoint, else the origin's.

    Raises:
        ConfigError: the origin has none, and the run no checkpoint.
    """
    run = Path(config.folder)
    if (run / "hf" / "config.json").is_file() and complete_checkpoints(run / "checkpoints"):
        return run / "hf"
    return side_files_dir(config.model)
