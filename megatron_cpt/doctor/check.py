"""What a check says: what it looked at, its verdict, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error", "not checked"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check; the field names are those of its JSON."""

    name: str
    looked_at: str
    verdict: Verdict
    detail: str  # what was found; for `not checked` why it could not be seen
    hint: str | None = None
    host: str | None = None  # the machine, where several took part


def failed(checks: Iterable[Check]) -> bool:
    """Whether one of `checks` is an error."""
    return any(check.verdict == "error" for check in checks)
