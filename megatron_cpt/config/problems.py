"""A problem with a config value, the one error that reports all of them together, and what a hint is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Attributes:
        path: the config key, dotted.
        value: what stands there, None when nothing does.
        rule: what is wrong, to be read after `path = value`.
        hint: a legal value or the next thing to do.
    """

    path: str
    value: Any
    rule: str
    hint: str

    @property
    def message(self) -> str:
        """The problem in one line, without its hint."""
        shown = self.path if self.value is None else f"{self.path} = {_shortened(self.value)}"
        return f"{shown}: {self.rule}"


def raise_problems(problems: Sequence[Problem], origin: str) -> None:
    """Raise one ConfigError that lists every problem; return when there is none.

    Args:
        problems: what was found.
        origin: the file or place that holds the config, for the message.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(f"{origin}: {problems[0].message}", hint=problems[0].hint)
    listed = "\n".join(f"  - {problem.message}\n    hint: {problem.hint}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in {origin}:\n{listed}", hint="fix all of them, then run again")


def near_match(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `known` that is most like `word`, None when none is at least `cutoff` like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def divisors(number: int, limit: int = 64) -> list[int]:
    """Return the divisors of `number` up to `limit`, ascending."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def _shortened(value: Any, longest: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
