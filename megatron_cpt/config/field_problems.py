"""pydantic's errors about single fields in this project's words: one problem each, with the nearest key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from megatron_cpt.config.problems import Problem, near_match


def field_problems(
    error: pydantic.ValidationError, known: Sequence[str], *, what: str = "config", page: str = "docs/config.md"
) -> list[Problem]:
    """Translate every error of a validation.

    Args:
        error: what pydantic found.
        known: the dotted keys there are, for the nearest one to a key that there is not.
        what: what was validated.
        page: where its keys are described.
    """
    return [_problem(item, known, what, page) for item in error.errors()]


def known_keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; those of a list's items stand right below the list's own."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def did_you_mean(path: str, known: Sequence[str], otherwise: str) -> str:
    """Ask for the key that is most like `path`, or say `otherwise`."""
    *parents, last = [part for part in path.split(".") if not part.isdigit()]
    near = near_match(".".join([*parents, last]), known)
    if near is None:
        same_name = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        near = same_name.get(near_match(last, same_name, cutoff=0.75) or "")
    if near is None:
        return otherwise
    if near.split(".")[:-1] == parents:  # a sibling: keep the numbers of list items
        near = ".".join([*path.split(".")[:-1], near.rsplit(".", 1)[-1]])
    return f"did you mean {near!r}?"


def _problem(item: Any, known: Sequence[str], what: str, page: str) -> Problem:
    path = ".".join(str(part) for part in item["loc"]) or what
    if item["type"] == "extra_forbidden":
        return Problem(
            path, item["input"], f"is not a key of the {what}", did_you_mean(path, known, f"{page} lists every key")
        )
    if item["type"] == "missing":
        return Problem(path, None, "is missing", f"{page} describes every key")
    rule = str(item["msg"]).removeprefix("Value error, ")
    value = None if isinstance(item["input"], dict | pydantic.BaseModel) else item["input"]
    legal = _legal_values(item.get("ctx") or {})
    return Problem(path, value, rule, legal or f"{page} describes every key with its unit")


def _legal_values(context: Mapping[str, Any]) -> str | None:
    """What pydantic's context of an error says of legal values: a list of words, or a bound."""
    if "expected" in context:
        return f"one of {context['expected']}"
    bounds = {"gt": "a number above", "ge": "a number of at least", "lt": "a number below", "le": "a number of at most"}
    return next((f"{words} {context[name]:g}" for name, words in bounds.items() if name in context), None)


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Schemas inside a possibly nested annotation such as tuple[Source, ...] or Dedup | None."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return [annotation] if issubclass(annotation, pydantic.BaseModel) else []
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]
