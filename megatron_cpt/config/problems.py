"""A problem with a config value, and the one error that reports all of them together."""

from __future__ import annotations

from collections.abc import Sequence
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

    def __str__(self) -> str:
        shown = self.path if self.value is None else f"{self.path} = {self.value!r}"
        return f"{shown}: {self.rule}\n    hint: {self.hint}"


def raise_problems(problems: Sequence[Problem], origin: str) -> None:
    """Raise one ConfigError that lists every problem; return when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        only = problems[0]
        shown = only.path if only.value is None else f"{only.path} = {only.value!r}"
        raise ConfigError(f"{origin}: {shown}: {only.rule}", hint=only.hint)
    listed = "\n".join(f"  - {problem}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in {origin}:\n{listed}", hint="mend them all, then run again")
