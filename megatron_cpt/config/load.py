"""YAML file + `key.sub=value` overrides -> RunConfig. Precedence: defaults < YAML < overrides.

The flat names of the hyper-parameter tables that people paste (`batch_size`, `learning_rate`, ...) and
Megatron's own words are accepted at the top level as aliases of the canonical keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_cpt.budget import parse_count
from megatron_cpt.config.field_problems import field_problems, known_keys
from megatron_cpt.config.foreign import recognised, refuse_corpus
from megatron_cpt.config.problems import Problem, raise_problems
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.yaml_file import parse_yaml, read_yaml

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
    "report": "log.report",
    "save_interval": "checkpoint.save_every",  # counts iterations
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "num_layers_in_first_pipeline_stage": "parallel.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.last_stage_layers",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lora_target_linear": "lora.targets",
}
# accepted so that a pasted table loads, but without a meaning here: name -> why
WITHOUT_MEANING: dict[str, str] = {
    "pad_length": "documents are packed into full sequences, so nothing is ever padded",
}


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
    refuse_corpus(raw, origin)
    config, problems = validate(raw, overrides)
    raise_problems(problems, origin)
    assert config is not None, "there is one where there are no problems"
    return config


def validate(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> tuple[RunConfig | None, list[Problem]]:
    """Return the config that a mapping describes, None if it describes none, and all that is wrong with its fields."""
    problems: list[Problem] = []
    tree = _canonical(raw, problems)
    for override in overrides:
        _apply_override(tree, override, problems)
    try:
        return RunConfig.model_validate(tree).with_phase_sum(), problems
    except pydantic.ValidationError as error:
        return None, problems + recognised(field_problems(error, known_paths()), frozenset(known_paths()))


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
    """The cloud recipes count `save_interval` in iterations and write no unit."""
    if key != "save_interval":
        return value
    try:
        return f"{parse_count(value)} iters"
    except (ValueError, TypeError):
        return value


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
        value = parse_yaml(text)
    except yaml.constructor.ConstructorError as error:
        problems.append(Problem(key, text, str(error.problem), "give each key once, with a plain value"))
        return
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


def known_paths() -> tuple[str, ...]:
    """Return all dotted keys of the schema, then the aliases."""
    return (*known_keys(RunConfig), *ALIASES)
