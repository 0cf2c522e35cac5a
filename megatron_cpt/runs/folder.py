"""The folder of a run: its config, what it may be continued with, and where everything lies.

RUN/resolved.yaml   the config in force, defaults written out        RUN/hf/      the model's side files
RUN/history.jsonl   every attempt: when, where, what changed           RUN/logs/    one file per rank
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
from megatron_cpt.architecture.families import read_config
from megatron_cpt.architecture.model_folder import side_files
from megatron_cpt.architecture.rope import with_rope
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.runs.rank_errors import rank_error_path

logger = logging.getLogger(__name__)

# A change of these makes it another run, as does a change of the model's content (launch/identity.py); everything else
# may change from one attempt to the next.
_IDENTITY = ("job_name", "seed", "precision.dtype", "lora.rank", "lora.alpha", "lora.rslora", "lora.targets")


@dataclass(frozen=True)
class Change:
    """One config key that differs from the last attempt; None stands for "not set"."""

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
        return rank_error_path(self.logs, rank)


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


def create_run_folder(folder: RunFolder, config: RunConfig, side_files: Path | None) -> None:
    """Create the folder with the config in force, and a copy of the model's `side_files` if given; one process does.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        for path in (folder.root, folder.logs, folder.checkpoints, folder.hf):
            path.mkdir(parents=True, exist_ok=True)
        if side_files is not None:
            _copy_side_files(side_files, folder.hf)
            if (rope := config.model.rope_change) is not None:  # the run's own model from now on, and every export's
                changed = with_rope(read_config(side_files), rope)
                write_atomically(folder.hf / "config.json", (json.dumps(changed, indent=2) + "\n").encode())
        write_atomically(folder.resolved, resolved_yaml(config).encode())
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: RunFolder, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the run folder {folder.root}: {error.strerror}",
        hint="set run_dir to a folder you may write, with space left",
    )


def changes_since_last_attempt(folder: RunFolder, config: RunConfig) -> list[Change]:
    """Every key that differs from the config in force, if the run has one; nothing is written.

    Raises:
        CheckpointError: the folder's resolved.yaml is not the config of a run.
    """
    if not folder.resolved.exists():
        return []
    try:
        old = read_yaml(folder.resolved)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder.resolved} is not the config of a run: {error.message}", hint="choose a new run_dir"
        ) from error
    old.setdefault("lora", LoraConfig().model_dump(mode="json"))  # of before there were adapters
    return [c for c in config_changes(old, resolved_dict(config)) if c.path != "run_dir"]


def refused_changes(changes: list[Change]) -> list[Change]:
    """Those that would make it another run."""
    return [change for change in changes if change.path in _IDENTITY]


def record_attempt(folder: RunFolder, changes: list[Change]) -> int:
    """Append this attempt to history.jsonl. Return its number, from 1.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    number = count_attempts(folder) + 1
    entry = {
        "start": number,
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
    return number


def count_attempts(folder: RunFolder) -> int:
    """How often the run was launched."""
    return len(folder.history.read_text().splitlines()) if folder.history.exists() else 0


def _copy_side_files(model_dir: Path, target: Path) -> None:
    """config.json, generation config and tokenizer, so that the run can be exported without the base model."""
    for name in side_files(model_dir):
        path = target / name
        if (model_dir / name).resolve() != path.resolve():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            shutil.copyfile(model_dir / name, partial)
            partial.replace(path)
