"""How a document is found in a parsed record: a key, a dotted path, or a template over several keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.encoding import NotUtf8, decoded
from megatron_cpt.corpus.readers.metadata import find_value, kept_values
from megatron_cpt.corpus.readers.unit import Unit

_FIELD = re.compile(r"\{([^{}]+)\}")


class FieldError(Exception):
    """The record has no such text; `reason` is one of a tally's."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TextField:
    """`simple` is the key itself when the field is just a key, so that readers may take a short cut."""

    field: str
    keys: tuple[str, ...]
    simple: bool
    text_of: Callable[[Any], str]


@cache
def text_field(field: str) -> TextField:
    """Compile `text`, `meta.body` or `{title}\\n\\n{body}`; a key that contains a dot literally also works."""
    keys = tuple(_FIELD.findall(field))
    if keys:
        return TextField(field, keys, False, lambda record: _FIELD.sub(lambda m: lookup(record, m[1]), field))
    return TextField(field, (field,), True, lambda record: lookup(record, field))


def lookup(record: Any, key: str) -> str:
    """The string under `key`, by the key itself or step by step along its dots. Raises FieldError."""
    if not isinstance(record, dict):
        raise FieldError("not_an_object", f"a JSON {type(record).__name__}")
    is_there, value = find_value(record, key)
    if not is_there:
        raise FieldError("missing_key", f"no key {key!r}; keys: {', '.join(map(str, record))}")
    if isinstance(value, bytes):
        value = _decoded(key, value)
    if not isinstance(value, str):
        raise FieldError("text_not_a_string", f"{key!r} is {type(value).__name__}")
    return value


def _decoded(key: str, value: bytes) -> str:
    """Text out of a column of bytes."""
    try:
        return decoded(value)
    except NotUtf8 as error:
        raise FieldError("invalid_utf8", f"{key!r}: {error}") from error


def empty_batch(unit: Unit, path: str) -> Batch:
    """A batch for the records of one file, which `add_record` fills."""
    return Batch(path, [], [], [] if unit.metadata else None)


def add_record(batch: Batch, unit: Unit, record: Any, place: int, tally: UnitTally) -> None:
    """Append one parsed record to the batch, or give it to the tally as a reject when it has no text."""
    try:
        text = text_field(unit.text_field).text_of(record)
        text.encode()
    except FieldError as error:
        tally.reject(batch.path, place, error.reason, error.detail)
        return
    except UnicodeEncodeError as error:
        tally.reject(batch.path, place, "lone_surrogate", str(error))
        return
    batch.texts.append(text)
    batch.places.append(place)
    if batch.metadata is not None:
        values = kept_values(record, unit.metadata)
        tally.metadata_found.update(list(values))
        batch.metadata.append({key: values.get(key) for key in unit.metadata})
