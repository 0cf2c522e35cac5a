"""The folder of a run: its config, what it may be continued with, and where everything lies.

RUN/resolved.yaml   the config in force, defaults written out        RUN/hf/      the model's side files
RUN/history.jsonl   every start: when, where, what changed           RUN/logs/    one file per rank
RUN/metrics.jsonl   one line per logged step, validation, event      RUN/checkpoints/
RUN/SAVE, RUN/STOP, RUN/KILL   switch files, see docs/recover.md
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt import __version__
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

# A change of these makes it another run; everything else may change from one start to the next.
_IDENTITY = ("job_name", "seed", "model.init_from", "model.architecture", "precision.dtype", "checkpoint.branch_from")
_NO_SIDE_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True)
class Change:
    """One config key that differs from the last start; None stands for "not set"."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.yaml"

    @property
    def history(self) -> Path:
        return self.root / "history.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def lease(self) -> Path:
        return self.root / "lease.json"

    @property
    def kill_switch(self) -> Path:
        return self.root / "KILL"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:04d}.log"

    def rank_error(self, rank: int) -> Path:
        """Written by a rank that fails for a known reason: {"message", "hint", "exit_code"}."""
        return self.logs / f"error_rank_{rank:04d}.json"


def resolved_dict(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def resolved_yaml(config: RunConfig) -> str:
    """The config with all defaults written out, as YAML."""
    return yaml.safe_dump(resolved_dict(config), sort_keys=False, allow_unicode=True)


def read_resolved(folder: RunFolder) -> RunConfig:
    """The config in force of a run.

    Raises:
        CheckpointError: the folder is not that of a run.
        ConfigError: its resolved.yaml is not a config of this version.
    """
    if not folder.resolved.is_file():
        raise CheckpointError(
            f"{folder.root} is not a run folder: it has no resolved.yaml", hint="give the run_dir of a run"
        )
    return build_config(read_yaml(folder.resolved), origin=str(folder.resolved))


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Every leaf that differs, lists as a whole."""
    changes: list[Change] = []
    for key in dict.fromkeys([*old, *new]):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            changes += config_changes(before, after, path + ".")
        elif before != after:
            changes.append(Change(path, before, after))
    return changes


def prepare_run_folder(
    config: RunConfig, model_dir: Path, *, accept_changes: bool = False
) -> tuple[RunFolder, list[Change]]:
    """Create the folder, or check that `config` may continue what is in it; one process calls this.

    Returns the folder and what changed since the last start.

    Raises:
        CheckpointError: the folder cannot be written, or it is another run's and `accept_changes` is off.
    """
    folder = RunFolder(Path(config.folder))
    try:
        for path in (folder.root, folder.logs, folder.checkpoints, folder.hf):
            path.mkdir(parents=True, exist_ok=True)
        (folder.root / ".writable").touch()
        (folder.root / ".writable").unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from error
    changes = check_continues(config, accept_changes=accept_changes)
    try:
        _copy_side_files(model_dir, folder.hf)
        write_atomically(folder.resolved, resolved_yaml(config).encode())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder, changes


def _cannot_write(folder: RunFolder, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the run folder {folder.root}: {error.strerror}",
        hint="set run_dir to a folder you may write, with space left",
    )


def check_continues(config: RunConfig, *, accept_changes: bool = False) -> list[Change]:
    """What changed since the last start of the run in the folder, if there was one; nothing is written.

    Raises:
        CheckpointError: the folder is another run's and `accept_changes` is off.
    """
    folder = RunFolder(Path(config.folder))
    changes = _changes_since_last_start(folder, config)
    refused = [change for change in changes if change.path in _IDENTITY]
    if refused and not accept_changes:
        raise CheckpointError(
            f"{folder.root} holds another run; its config differs in\n"
            + "\n".join(f"  {change}" for change in changes),
            hint="choose a new run_dir, or pass --accept-changes to continue this run with the new values",
        )
    return changes


def _changes_since_last_start(folder: RunFolder, config: RunConfig) -> list[Change]:
    if not folder.resolved.exists():
        return []
    try:
        old = read_yaml(folder.resolved)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder.resolved} is not the config of a run: {error.message}", hint="choose a new run_dir"
        ) from error
    return [c for c in config_changes(old, resolved_dict(config)) if c.path != "run_dir"]


def record_start(folder: RunFolder, config: RunConfig, changes: list[Change]) -> int:
    """Append this start to history.jsonl; returns its number, from 1."""
    lines = folder.history.read_text().splitlines() if folder.history.exists() else []
    entry = {
        "start": len(lines) + 1,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "version": __version__,
        "changes": [{"path": c.path, "old": c.old, "new": c.new} for c in changes],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    try:
        with folder.history.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return len(lines) + 1


def _copy_side_files(model_dir: Path, target: Path) -> None:
    """config.json, generation config and tokenizer, so that the run can be exported without the base model."""
    for path in sorted(model_dir.iterdir()):
        wanted = path.is_file() and not path.name.endswith(_NO_SIDE_FILES) and not path.name.startswith(".")
        if wanted and path.resolve() != (target / path.name).resolve():
            partial = target / (path.name + ".partial")
            shutil.copyfile(path, partial)
            partial.replace(target / path.name)
