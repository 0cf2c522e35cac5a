"""A user's own task: a YAML file of lm-evaluation-harness beside its data, read strictly.

lm-eval takes relative paths from wherever the command runs, answers an unknown key with a traceback, and copies JSONL
into a cache in the home directory. Here an unknown key is one message, paths are relative to the task file, and JSONL
stays in memory: no cache, no network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.problems import near_match
from megatron_cpt.errors import ConfigError, DataError

SHIPPED = Path(__file__).parent / "shipped_tasks"  # what `include` finds by its bare name
_OF_METRICS = ("metric", "aggregation", "higher_is_better", "hf_evaluate")
_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def read_task_file(path: Path) -> dict[str, Any]:
    """Return the config of one task as lm-eval's TaskManager takes it, its JSONL read.

    Raises:
        ConfigError: the file cannot be read, or says something that lm-eval has no place for.
        DataError: its data is not there, or is no JSONL.
    """
    config = _with_includes(path, ())
    _check_keys(config, path)
    config["task"] = str(config.get("task") or path.stem)
    if config.get("dataset_path") == "json":
        config["custom_dataset"] = _dataset(config, path)
    elif isinstance(files := (config.get("dataset_kwargs") or {}).get("data_files"), (str, list, dict)):
        config["dataset_kwargs"]["data_files"] = _absolute(files, path)
    return config


def _with_includes(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if path in seen:
        raise ConfigError(f"{path}: the files include each other in a circle: {', '.join(map(str, seen))}")
    if not path.is_file():
        where = f", included by {seen[-1]}" if seen else ""
        raise ConfigError(f"the task file {path} is not there{where}", hint="give the path of a .yaml file")
    try:
        config: dict[str, Any] = load_yaml(path, recursive=False)
    except (yaml.YAMLError, ValueError, ImportError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no task file: {_one_line(error)}", hint="docs/measure.md has one") from error
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        near, shipped = path.parent / name, SHIPPED / f"{name}.yaml"
        merged |= _with_includes(shipped if not near.exists() and shipped.exists() else near, (*seen, path))
    return merged | config


def _check_keys(config: Mapping[str, Any], path: Path) -> None:
    from lm_eval.api.task import TaskConfig

    known = sorted(field.name for field in fields(TaskConfig))
    for key in config:
        if key in ("group", "task_list", "class"):
            raise ConfigError(f"{path}: {key!r} makes it no single task", hint="give one file for each task")
        if key not in known:
            raise ConfigError(f"{path} has a key that no task has: {key!r}", hint=_meant(str(key), known))
    kind = config.get("output_type", "generate_until")
    if kind not in _OUTPUT_TYPES:
        raise ConfigError(f"{path}: output_type is {kind!r}", hint=f"one of {', '.join(_OUTPUT_TYPES)}")
    if not config.get("dataset_path"):
        raise ConfigError(
            f"{path} names no data: dataset_path is missing",
            hint="dataset_path: json, and dataset_kwargs: {data_files: {test: items.jsonl}}",
        )
    if not (config.get("test_split") or config.get("validation_split")):
        raise ConfigError(f"{path} says not which items to ask: test_split is missing", hint="test_split: test")
    metrics = config.get("metric_list")
    if not isinstance(metrics, list) or not metrics:
        raise ConfigError(f"{path} names no metric: metric_list is missing", hint="metric_list: [{metric: acc}]")
    for entry in metrics:
        _check_metric(entry, path, counts_itself=callable(config.get("process_results")))


def _check_metric(entry: object, path: Path, *, counts_itself: bool) -> None:
    from lm_eval.api import metrics, registry

    assert metrics  # fills the registry
    if not isinstance(entry, dict) or not entry.get("metric"):
        raise ConfigError(f"{path}: an entry of metric_list is {entry!r}", hint="metric_list: [{metric: acc}]")
    name = entry["metric"]
    for key in entry:
        near = near_match(str(key), _OF_METRICS)
        if key not in _OF_METRICS and near:  # any other goes to the metric's function
            raise ConfigError(f"{path}: the metric {name!r} has a key {key!r}", hint=f"did you mean {near!r}?")
    known = [str(known) for known in registry.metric_registry]
    if isinstance(name, str) and not counts_itself and not entry.get("hf_evaluate") and name not in known:
        raise ConfigError(f"{path}: there is no metric {name!r}", hint=_meant(name, known))


def _dataset(config: Mapping[str, Any], path: Path) -> Callable[..., dict[str, Any]]:
    """Read the JSONL files of a task. Return the function that gives lm-eval its data."""
    kwargs = config.get("dataset_kwargs") or {}
    named = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if not isinstance(named, dict) or not named:
        raise ConfigError(
            f"{path}: dataset_path json needs a file for each split",
            hint="dataset_kwargs: {data_files: {test: items.jsonl}}",
        )
    rows = {split: _rows(file, path) for split, file in named.items()}
    for key in ("test_split", "validation_split", "training_split", "fewshot_split"):
        if (split := config.get(key)) is not None and split not in rows:
            raise ConfigError(f"{path}: {key} is {split!r}, which data_files lacks", hint=_meant(str(split), [*rows]))

    def give(**_: object) -> dict[str, Any]:
        import datasets

        try:
            return {split: datasets.Dataset.from_list(items) for split, items in rows.items()}
        except (ValueError, TypeError) as error:  # pyarrow's are subclasses of these
            raise DataError(
                f"the items of {path} are not of one kind: {_one_line(error)}",
                hint="each key must hold values of one type in all lines",
            ) from error

    return give


def _rows(named: object, path: Path) -> list[dict[str, Any]]:
    if not isinstance(named, str):
        raise ConfigError(f"{path}: data_files holds {named!r}", hint="one file for each split")
    file = path.parent / named
    if not file.is_file():
        raise DataError(f"{path}: its data {file} is not there", hint="paths are relative to the task file")
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text", hint="write it as JSONL: one object a line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}", hint="one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} is no JSON object", hint="one JSON object a line")
        rows.append(row)
    if not rows:
        raise DataError(f"{file} holds no items", hint="one JSON object a line")
    return rows


def _absolute(files: str | list[Any] | dict[str, Any], path: Path) -> Any:
    if isinstance(files, str):
        return files if "://" in files else str(path.parent.resolve() / files)
    if isinstance(files, list):
        return [_absolute(file, path) for file in files]
    return {split: _absolute(file, path) for split, file in files.items()}


def _meant(name: str, known: list[str]) -> str:
    near = near_match(name, known)
    return f"did you mean {near!r}?" if near else f"there are: {', '.join(sorted(known))}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
