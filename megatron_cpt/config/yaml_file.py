"""The one reader of YAML that people write: a run's config, a corpus, a registry, a value on the command line.

PyYAML keeps the last of two equal keys and says nothing; here that is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key which stands twice in one mapping."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: its keys may be stated anew
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict | set):
            raise yaml.constructor.ConstructorError(None, None, "a key is not a plain value", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        yaml.YAMLError: not YAML, a key twice in one mapping, or a value that YAML's own types refuse.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, AttributeError, TypeError) as error:  # a date such as 2026-13-45, an int of 5,000 digits
        raise yaml.YAMLError(f"it holds a value that cannot be read: {error}") from error


def read_yaml(
    path: Path, *, what: str = "config", hint: str = "examples/quickstart/config.yaml is one"
) -> dict[str, Any]:
    """Read the mapping in a YAML file, or in a JSON file when its name ends in .json.

    Args:
        path: the file.
        what: what it is called in an error.
        hint: what to say to someone whose file is missing or holds something else.

    Raises:
        ConfigError: missing, not UTF-8, not YAML, a key twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", hint="save the file as UTF-8"
        ) from error
    try:
        loaded = _parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path} is not valid {kind}: {error}", hint="correct that place in the file") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values", hint=hint)
    return loaded


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"key {twice!r} stands twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)
