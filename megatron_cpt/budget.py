"""Token arithmetic: the one currency of a run. Standard library only.

A budget is stated in tokens; iterations, samples and intervals are derived from it here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_cpt.errors import ConfigError

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
        """`100M tokens`, `1000 iters`, `1.5B`, `163_840`; a bare number counts tokens.

        Raises:
            ValueError: not an interval, or zero.
        """
        if isinstance(text, Interval):
            return text
        unit: Literal["tokens", "iters"] = "tokens"
        if isinstance(text, str) and (match := _UNIT.match(text)):
            unit = "tokens" if match.group(2).lower().startswith("token") else "iters"
            text = match.group(1)
        count = parse_count(text)
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
class Steps:
    """A token budget cut into optimizer steps."""

    requested_tokens: int
    tokens_per_step: int
    train_iters: int

    @property
    def train_tokens(self) -> int:
        """What will really be trained: `train_iters` whole steps."""
        return self.train_iters * self.tokens_per_step

    @property
    def added_tokens(self) -> int:
        """Tokens that rounding up to a whole step added to the request."""
        return self.train_tokens - self.requested_tokens


def ramped_batch_size(consumed_tokens: int, full: int, first: int | None, rampup_tokens: int) -> int:
    """Samples of the step after `consumed_tokens`: `first`, raised by `first` at equal distances, `full` at the end."""
    if first is None or consumed_tokens >= rampup_tokens:
        return full
    levels = full // first
    return first * (1 + consumed_tokens * (levels - 1) // rampup_tokens)


def plan_ramped_steps(
    requested_tokens: int,
    seq_length: int,
    full: int,
    first: int | None,
    rampup_tokens: int,
    consumed: int = 0,
) -> tuple[int, int]:
    """(steps from `consumed` tokens on, tokens at the end) of a run of whole steps until the budget is reached.

    The batch has `full` samples, or grows to that from `first` over `rampup_tokens`.
    """
    steps = 0
    while consumed < requested_tokens:
        size = ramped_batch_size(consumed, full, first, rampup_tokens)
        until = requested_tokens
        if size < full:  # to the next rise, not step by step
            assert first is not None
            rise = -(-rampup_tokens * (size // first) // (full // first - 1))
            until = min(until, max(rise, consumed + 1))
        more = -(-(until - consumed) // (size * seq_length))
        steps, consumed = steps + more, consumed + more * size * seq_length
    return steps, consumed


Rounding = Literal["up", "exact"]


def broken_rule(train_tokens: int, tokens_per_step: int, rounding: Rounding) -> tuple[str, str] | None:
    """What is wrong with a budget as (rule, hint), None when nothing is."""
    whole, remainder = divmod(train_tokens, tokens_per_step)
    if not whole:
        return (
            f"is smaller than one step of {tokens_per_step:,} tokens (global_batch_size x seq_length)",
            f"at least {tokens_per_step:,}, or lower batch.global_batch_size or batch.seq_length",
        )
    if remainder and rounding == "exact":
        return (
            f"is not a multiple of {tokens_per_step:,} tokens per step: {remainder:,} tokens are left over",
            f"{whole * tokens_per_step:,} or {(whole + 1) * tokens_per_step:,}, or budget.rounding: up",
        )
    return None


def plan_steps(train_tokens: int, tokens_per_step: int, rounding: Rounding = "up") -> Steps:
    """Cut `train_tokens` into steps of `tokens_per_step` = global_batch_size * seq_length.

    Raises:
        ConfigError: the budget is smaller than one step, or `exact` is asked for and there is a remainder.
    """
    if broken := broken_rule(train_tokens, tokens_per_step, rounding):
        raise ConfigError(f"budget.train_tokens = {train_tokens:,} {broken[0]}", hint=broken[1])
    return Steps(train_tokens, tokens_per_step, -(-train_tokens // tokens_per_step))
