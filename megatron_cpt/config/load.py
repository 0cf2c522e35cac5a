"""YAML file + `key.sub=value` overrides -> RunConfig. Precedence: defaults < YAML < overrides.

The flat names of the hyper-parameter tables that people paste (`batch_size`, `learning_rate`, ...) and
Megatron's own words are accepted at the top level as aliases of the canonical keys.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_cpt.config.problems import Problem, raise_problems
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

logger = logging.getLogger(__name__)

# alias at the top level -> canonical path
ALIASES: dict[str, str] = {
    "batch_size": "batch.micro_batch_size",
    "micro_batch_size": "batch.micro_batch_size",
    "global_batch_size": "batch.global_batch_size",
    "sequence_length": "batch.seq_length",
    "seq_length": "batch.seq_length",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "min_learning_rate": "optimizer.min_lr",
    "min_lr": "optimizer.min_lr",
    "train_tokens": "budget.train_tokens",
    "warmup_tokens": "budget.warmup_tokens",
    "save_every": "checkpoint.save_every",
    "save_interval": "checkpoint.save_every",  # counts iterations
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "num_layers_in_first_pipeline_stage": "parallel.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.last_stage_layers",
}
# accepted so that a pasted table loads, but without a meaning here: name -> why
WITHOUT_MEANING: dict[str, str] = {
    "pad_length": "documents are packed into full sequences, so nothing is ever padded",
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys in silence; here that is an error."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: missing, not UTF-8, not YAML, a key twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read config {path}: {error.strerror}", hint="give the path of a run's YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", hint="save the file as UTF-8"
        ) from error
    try:
        loaded = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", hint="check the indentation there") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds no mapping of keys to values", hint="start from examples/quickstart/config.yaml"
        )
    return loaded


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read, override and validate one run's config.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` each; the value is YAML (`optimizer.lr=1e-5`, `data.train.0.weight=2`).

    Raises:
        ConfigError: everything wrong with single fields, all at once; `derive` checks across fields.
    """
    return build_config(read_yaml(Path(path)), overrides, origin=str(path))


def build_config(raw: Mapping[str, Any], overrides: Iterable[str] = (), origin: str = "config") -> RunConfig:
    """Validate a mapping as `load_config` does for a file."""
    problems: list[Problem] = []
    tree = _canonical(raw, problems)
    for override in overrides:
        _apply_override(tree, override, problems)
    try:
        config = RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
        raise_problems(problems, origin)
    raise_problems(problems, origin)
    return config


def _canonical(raw: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Move aliases to their canonical paths; an alias that contradicts another value is a problem."""
    tree = {key: _copy(value) for key, value in raw.items() if key not in ALIASES and key not in WITHOUT_MEANING}
    for key, value in raw.items():
        if key in WITHOUT_MEANING:
            logger.info("%s: %s is accepted and has no effect: %s", key, value, WITHOUT_MEANING[key])
        if key not in ALIASES:
            continue
        path = ALIASES[key]
        value = _interval_in_iters(key, value)
        section = tree.setdefault(path.split(".")[0], {})
        name = path.split(".")[1]
        if isinstance(section, dict):
            if name in section and section[name] != value:
                problems.append(
                    Problem(
                        key,
                        value,
                        f"is another name of {path}, which says {section[name]!r}",
                        "give one of the two",
                    )
                )
            section[name] = value
    return tree


def _interval_in_iters(key: str, value: Any) -> Any:
    return f"{value} iters" if key == "save_interval" and str(value).strip().replace("_", "").isdigit() else value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _apply_override(tree: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(Problem(override, None, "is not of the form key.sub=value", "for example optimizer.lr=1e-5"))
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if key in WITHOUT_MEANING:
        logger.info("%s=%s has no effect: %s", key, text, WITHOUT_MEANING[key])
        return
    value = _interval_in_iters(key, value)
    *parents, last = ALIASES.get(key, key).split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
        else:
            problems.append(Problem(key, text, f"has no part {part!r}", "count list items from 0"))
            return
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            problems.append(Problem(key, text, f"has no item {last!r}", f"0 to {len(node) - 1}"))
            return
        node[int(last)] = value
    else:
        node[last] = value


def _problem(item: Any) -> Problem:
    """One pydantic error -> one problem in this project's words."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return Problem(path, item["input"], "is not a key of the config", _did_you_mean(path))
    if item["type"] == "missing":
        return Problem(path, None, "is missing", "docs/config.md describes every key")
    rule = str(item["msg"]).removeprefix("Value error, ")
    return Problem(path, item["input"], rule, _legal(item))


def _legal(item: Any) -> str:
    context = item.get("ctx") or {}
    if "expected" in context:
        return f"one of {context['expected']}"
    return "docs/config.md describes every key with its unit"


def _did_you_mean(path: str) -> str:
    known = list(known_paths())
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not near:
        last = path.rsplit(".", 1)[-1]
        near = [
            p
            for p in known
            if p.rsplit(".", 1)[-1] in difflib.get_close_matches(last, [p.rsplit(".", 1)[-1]], cutoff=0.75)
        ]
    return f"did you mean {near[0]!r}?" if near else "docs/config.md lists every key"


def known_paths(model: type[pydantic.BaseModel] = RunConfig, prefix: str = "") -> Iterable[str]:
    """All dotted keys of the schema, then the aliases."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from known_paths(field.annotation, f"{prefix}{name}.")
    if model is RunConfig:
        yield from ALIASES
