"""The kept keys of a document, as values that JSON can hold: whatever type the input gives them."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

_INTEGERS = range(-(1 << 63), 1 << 64)  # those of 64 bits, with or without a sign


def find_value(record: Any, key: str) -> tuple[bool, Any]:
    """(whether the record has the key, its value), by the key itself or along its dots, which names may also have."""
    if not isinstance(record, dict):
        return False, None
    if key in record:
        return True, record[key]
    dot = key.find(".")
    while dot >= 0:
        if isinstance(inner := record.get(key[:dot]), dict):
            is_there, value = find_value(inner, key[dot + 1 :])
            if is_there:
                return True, value
        dot = key.find(".", dot + 1)
    return False, None


def kept_values(record: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Key -> value for the keys that the record has, each as JSON."""
    found = {key: find_value(record, key) for key in keys}
    return {key: json_value(value) for key, (is_there, value) in found.items() if is_there}


def json_value(value: Any) -> Any:
    """A value that JSON can hold and UTF-8 can encode.

    Decimals, large integers, times and durations become text as Python writes them (ISO 8601), bytes become their
    text or base64, and not-a-number and infinities null.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int):
        return value if value in _INTEGERS else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(json_value(key)): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return _as_text(value)


def _as_text(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return base64.b64encode(data).decode()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return f"PT{Decimal(value // datetime.timedelta(microseconds=1)) / 1_000_000}S"
    return str(value)
