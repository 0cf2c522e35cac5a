"""What is entered in a form as the tree of a YAML file, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from megatron_cpt.config.problems import Problem
from megatron_cpt.config.yaml_file import parse_yaml
from megatron_cpt.web.forms import FormField, FormSection

Entered = Mapping[str, object]  # dotted key -> text; of `rows` a list of name -> text; of `pairs` name -> text


def tree_of(sections: Iterable[FormSection], entered: Entered) -> tuple[dict[str, Any], list[Problem]]:
    """Return the nested values of what was entered, without what was left empty, and what could not be read."""
    tree: dict[str, Any] = {}
    fields = {field.path: field for section in sections for field in section.fields}
    problems = [
        Problem(str(path), None, "is not a key of the form", "reload the page")
        for path in entered
        if path not in fields
    ]
    for path, field in fields.items():
        try:
            value = _value(field, entered.get(path))
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            problems.append(Problem(path, None, f"cannot be read: {_in_one_line(error)}", "write it as in a YAML file"))
            continue
        if value is not None:
            *parents, last = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
    return tree, problems


def entered_of(sections: Iterable[FormSection], tree: Mapping[str, Any]) -> dict[str, object]:
    """Return how the values of `tree` would be entered."""
    found: dict[str, object] = {}
    for field in (field for section in sections for field in section.fields):
        value: Any = tree
        for part in field.path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None or value == [] or value == {}:
            continue
        if field.kind == "rows":
            found[field.path] = [
                {key: _text(row[key]) for key in field.columns if row.get(key) is not None} for row in value
            ]
        elif field.kind == "pairs":
            found[field.path] = {str(key): _text(item) for key, item in value.items()}
        else:
            found[field.path] = _text(value)
    return found


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Return the tree as a YAML file."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=100)


def _value(field: FormField, entered: Any) -> Any:
    if entered is None or entered in ("", [], {}):
        return None
    if field.kind == "rows":
        rows = [
            {key: _read(key, str(text).strip()) for key, text in row.items() if str(text).strip()} for row in entered
        ]
        return [row for row in rows if row] or None
    if field.kind == "pairs":
        pairs = {str(key).strip(): _read("", str(text).strip()) for key, text in entered.items()}
        return {key: value for key, value in pairs.items() if key and value is not None} or None
    if not isinstance(entered, str):
        raise TypeError("text is expected")
    text = entered.strip()
    return (text or None) if field.verbatim else parse_yaml(text)


def _read(key: str, text: str) -> Any:
    return text if key in ("name", "prefix", "text", "role") else parse_yaml(text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
