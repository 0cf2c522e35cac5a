"""Token arithmetic: the one currency of a run. Standard library only.

A budget is stated in tokens; iterations, samples and intervals are derived from it here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["up", "exact"]

_MULTIPLIER = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"^\s*(\d[\d_,]*(?:\.\d+)?)\s*([KMBT]?)\s*$", re.IGNORECASE)
_UNIT = re.compile(r"^(.*?)\s*\b(tokens?|iters?|iterations?|steps?)\s*$", re.IGNORECASE)


def parse_count(text: str | int | float) -> int:
    """`1.5B`, `163_840`, `1,638,400`, `100M` or a number -> a whole number.

    Raises:
        ValueError: not a count, negative, or not whole (`1.2345K` is 1234.5).
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a count")
    if isinstance(text, int):
        value = text
    elif isinstance(text, float):
        if not text.is_integer():
            raise ValueError(f"{text!r} is not a whole number")
        value = int(text)
    else:
        match = _COUNT.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a count such as 1_638_400, 100M or 1.5B")
        digits, suffix = match.group(1).replace("_", "").replace(",", ""), match.group(2).upper()
        whole, _, fraction = digits.partition(".")
        scaled = int(whole + fraction) * _MULTIPLIER[suffix]  # exact: no float touches a budget
        value, rest = divmod(scaled, 10 ** len(fraction))
        if rest:
            raise ValueError(f"{text!r} is not a whole number")
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    return value


def format_count(count: int) -> str:
    """1500000000 -> '1.5B'; exact, so 1638400 stays '1,638,400'."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size and (count * 100) % size == 0:
            return f"{count / size:.2f}".rstrip("0").rstrip(".") + suffix
    return f"{count:,}"


@dataclass(frozen=True)
class Interval:
    """How often something happens: every `count` tokens or every `count` iterations."""

    count: int
    unit: Literal["tokens", "iters"]

    @classmethod
    def parse(cls, text: str | int | float | Interval) -> Interval:
        """`100M tokens`, `1000 iters`. A number without a unit is refused: trainers count both ways.

        Raises:
            ValueError: not an interval, without a unit, or zero.
        """
        if isinstance(text, Interval):
            return text
        match = _UNIT.match(text) if isinstance(text, str) else None
        if match is None:
            count = parse_count(text)
            raise ValueError(f"{text!r} has no unit: {format_count(count)} iters, or {format_count(count)} tokens")
        unit: Literal["tokens", "iters"] = "tokens" if match.group(2).lower().startswith("token") else "iters"
        count = parse_count(match.group(1))
        if count == 0:
            raise ValueError("an interval must be at least 1 (leave it out to switch it off)")
        return cls(count, unit)

    def due(self, *, before_tokens: int, after_tokens: int, iteration: int) -> bool:
        """Whether a step that took the run from `before_tokens` to `after_tokens` crosses a multiple.

        `iteration` is the number of the step just done, from 1. A pure function of the position, so that
        a resumed run, or one whose batch size changed, keeps the rhythm of the undisturbed one.
        """
        if self.unit == "iters":
            return iteration % self.count == 0
        return after_tokens // self.count > before_tokens // self.count

    def in_tokens(self, tokens_per_step: int) -> int:
        return self.count if self.unit == "tokens" else self.count * tokens_per_step

    def __str__(self) -> str:
        return f"{format_count(self.count)} {self.unit}"


@dataclass(frozen=True)
class BatchSize:
    """Samples of each optimizer step: `full` of them, or a ramp that grows to `full` in steps of `first`."""

    full: int
    first: int | None = None  # None: no ramp
    rampup_tokens: int = 0  # from the start of the run to the full size

    def at(self, consumed_tokens: int) -> int:
        """Return the samples of the step that begins after `consumed_tokens`."""
        if self.first is None or consumed_tokens >= self.rampup_tokens:
            return self.full
        return self.first * (1 + consumed_tokens * (self._levels - 1) // self.rampup_tokens)

    def unchanged_until(self, consumed_tokens: int) -> int | None:
        """Return the token from which `at` gives more than it does at `consumed_tokens`, None if it never does."""
        size = self.at(consumed_tokens)
        if self.first is None or size == self.full:
            return None
        rise = -(-self.rampup_tokens * (size // self.first) // max(1, self._levels - 1))
        return max(consumed_tokens + 1, rise)

    @property
    def _levels(self) -> int:
        assert self.first is not None
        return max(1, self.full // self.first)


@dataclass(frozen=True)
class Steps:
    """The whole optimizer steps that reach a token budget; `cut_budget` makes it."""

    requested_tokens: int
    consumed_tokens: int  # where the cut begins
    train_iters: int  # steps from there
    train_tokens: int  # where the last of them ends, counted from the start of the run
    last_step_tokens: int

    @property
    def added_tokens(self) -> int:
        """Tokens that rounding up to a whole step adds to the request."""
        return self.train_tokens - self.requested_tokens

    def broken_rule(self, rounding: Rounding) -> tuple[str, str] | None:
        """Return what is wrong with the budget as (rule, hint), None when nothing is."""
        step = self.last_step_tokens
        below = self.train_tokens - step
        if self.consumed_tokens == 0 and self.requested_tokens < step and self.train_iters <= 1:
            return (
                f"is smaller than one step of {step:,} tokens (global_batch_size x seq_length)",
                f"at least {step:,}, or lower batch.global_batch_size or batch.seq_length",
            )
        if self.train_iters and self.added_tokens and rounding == "exact":
            return (
                f"does not end with a whole step of {step:,} tokens: {self.requested_tokens - below:,} tokens are "
                "left over",
                f"{below:,} or {self.train_tokens:,}, or budget.rounding: up",
            )
        return None


def cut_budget(requested_tokens: int, batch_size: BatchSize, seq_length: int, consumed_tokens: int = 0) -> Steps:
    """Cut a budget into whole steps; the last one may end behind the budget.

    Args:
        requested_tokens: end of the run, counted from its start.
        batch_size: samples per step, as a function of the position.
        seq_length: tokens per sample.
        consumed_tokens: where the run stands; the steps are counted from here. The end is the same from every
            position that a run passes through, and moves only when the size of the batch was changed on the way.
    """
    iters, position = 0, consumed_tokens
    step_tokens = batch_size.at(position) * seq_length
    while position < requested_tokens:  # from one rise of the batch to the next, not step by step
        step_tokens = batch_size.at(position) * seq_length
        until = min(requested_tokens, batch_size.unchanged_until(position) or requested_tokens)
        more = -(-(until - position) // step_tokens)
        iters, position = iters + more, position + more * step_tokens
    return Steps(requested_tokens, consumed_tokens, iters, position, step_tokens)
