"""What `--tasks` names: task files, and tasks, groups and tags of lm-evaluation-harness."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.problems import near_match
from megatron_cpt.errors import ConfigError, CptError, DataError
from megatron_cpt.eval.task_files import read_task_file

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class NamedTask:
    """A task to measure: lm-eval's object, and which of its metrics are looked at, the most important one first.

    `group` is the group or tag by which it was named, None where it was named itself.
    """

    name: str
    task: Any
    metrics: tuple[str, ...]
    group: str | None = None


def is_file_name(name: str) -> bool:
    """Whether an entry of `--tasks` means a task file."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def load_tasks(names: Sequence[str], *, offline: bool) -> list[NamedTask]:
    """Load the tasks with their data, once for all models.

    With `offline`, or when all are files with JSONL beside them, no connection is opened.

    Raises:
        ConfigError: an unknown task, or a task file that says something wrong.
        DataError: the data of a task cannot be had.
        CptError: lm-eval is not installed.
    """
    if offline or all(map(is_file_name, names)):
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CptError(
            "tasks need the package lm-eval", hint="pip install 'megatron-cpt[tasks]' (about 400 MB)"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are of defaults that are meant
    manager = TaskManager(include_defaults=not all(map(is_file_name, names)))
    found: dict[str, NamedTask] = {}
    for name in names:
        loaded = _load_file(manager, Path(name)) if is_file_name(name) else _load_known(manager, name, offline)
        for task_name, task in loaded["tasks"].items():
            if task_name in found:
                raise ConfigError(f"the task {task_name!r} is named twice", hint="--tasks names each task once")
            group = name if len(loaded["tasks"]) > 1 else None
            found[task_name] = NamedTask(task_name, task, tuple(task.aggregation()), group)
    return [*found.values()]


def _load_file(manager: Any, path: Path) -> Any:
    config = read_task_file(path)
    try:
        return manager.load([config])
    except CptError:
        raise
    except Exception as error:  # whatever the templates and functions of the file raise on its items
        raise ConfigError(
            f"{path} does not fit its items: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="do doc_to_text, doc_to_target and doc_to_choice name keys that every item has?",
        ) from error


def _load_known(manager: Any, name: str, offline: bool) -> Any:
    if name not in manager.all_tasks:
        near = near_match(name, manager.all_tasks)
        raise ConfigError(
            f"lm-eval has no task {name!r}",
            hint=f"did you mean {near!r}?"
            if near
            else "`lm-eval ls tasks` lists them; a file of your own ends in .yaml",
        )
    try:
        return manager.load([name])
    except Exception as error:  # the hub, the data set's own code, a missing package: all end here
        why = " ".join(str(error).split())[:300]
        raise DataError(
            f"the data of the task {name} cannot be read: {type(error).__name__}: {why}",
            hint="without a network name a task file with its items beside it (docs/measure.md)"
            if offline or _is_network(error)
            else "the message above is that of the datasets library; a task file of your own needs no hub",
        ) from error


def _is_network(error: BaseException | None) -> bool:
    """Whether somewhere down the chain of causes there was no connection."""
    while error is not None:
        if isinstance(error, OSError) and ("onnect" in type(error).__name__ or "onnect" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
