"""What pages of numbers by pipeline stage are made of, in `plan` and in `dry-run`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_COLUMNS = 110
_MOST_STAGES = 8

Stage = TypeVar("Stage")


def wrapped(text: str) -> Iterator[str]:
    """The lines of a sentence that may be long; paths and option names stay whole."""
    yield from textwrap.wrap(text, _COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def told_apart(stages: Sequence[Stage], total: Callable[[Stage], int], fullest: int) -> list[Stage]:
    """All stages, first to last; of a deep pipeline the first, the last and the `fullest` that hold most."""
    if len(stages) <= _MOST_STAGES:
        return list(stages)
    places = sorted(range(len(stages)), key=lambda place: -total(stages[place]))[:fullest]
    return [stages[place] for place in sorted({*places, 0, len(stages) - 1})]
