"""`schedule`: the learning rate over the budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections, Tokens
from megatron_cpt.config.sections.batch import BatchConfig
from megatron_cpt.config.sections.budget import BudgetConfig
from megatron_cpt.config.sections.optimizer import OptimizerConfig


class ScheduleConfig(Section):
    """The learning rate as a pure function of consumed tokens."""

    kind: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt", "infinite"] = Field(
        "cosine",
        description="Shape after the warm-up. wsd: warm-up, stable, decay; infinite: warm-up, cool-down, constant, "
        "anneal.",
    )
    decay_tokens: Tokens | None = Field(
        None, description="Tokens of the final decay of `wsd` and `infinite`; default 10 % of train_tokens."
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="Shape of the decay of `wsd`.")
    cooldown_tokens: Tokens = Field(0, description="`infinite`: tokens from lr down to constant_lr.")
    constant_lr: float | None = Field(None, gt=0, description="`infinite`: rate between cool-down and anneal.")
    start_tokens: Tokens = Field(
        0,
        description="Token of the run at which this schedule begins. Set it to the tokens consumed so far to "
        "re-warm a continued run: the warm-up then starts there.",
    )
    warmup_from_lr: float = Field(0.0, ge=0, description="Rate at which the warm-up starts.")

    def final_decay_tokens(self, train_tokens: int, warmup_tokens: int) -> int:
        """Return the tokens of the last decay of a run that ends at `train_tokens`.

        `decay_tokens`, or 10 % of the budget, for the kinds with a decay of their own; else all after the warm-up.
        """
        if self.kind in ("wsd", "infinite"):
            return train_tokens // 10 if self.decay_tokens is None else self.decay_tokens
        if self.kind == "constant":
            return 0
        return train_tokens - self.start_tokens - warmup_tokens

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        yield from self._kind_problems(run[OptimizerConfig])
        if self.warmup_from_lr > run[OptimizerConfig].lr:
            yield Problem(
                "schedule.warmup_from_lr",
                self.warmup_from_lr,
                f"is above optimizer.lr = {run[OptimizerConfig].lr}",
                "a lower rate",
            )
        budget = run[BudgetConfig]
        if not any(budget.problems(run, arch)):  # else the run has no known end
            yield from self._length_problems(budget.steps(run[BatchConfig]).train_tokens, budget.warmup_tokens)

    def _length_problems(self, train_tokens: int, warmup_tokens: int) -> Iterator[Problem]:
        """Whether start, warm-up, cool-down and decay fit into the budget."""
        room = train_tokens - self.start_tokens
        if room <= 0:
            yield Problem(
                "schedule.start_tokens",
                self.start_tokens,
                f"is not before the end of the budget, train_tokens = {train_tokens:,}",
                "raise budget.train_tokens: it counts from the start of the run, not from here",
            )
            return
        if warmup_tokens > room:
            less = f" less schedule.start_tokens = {self.start_tokens:,}" if self.start_tokens else ""
            yield Problem(
                "budget.warmup_tokens",
                warmup_tokens,
                f"exceeds train_tokens = {train_tokens:,}{less}",
                f"about 1 % of it: {train_tokens // 100:,}",
            )
            return
        if self.kind == "inverse_sqrt" and warmup_tokens == 0:
            yield Problem(
                "budget.warmup_tokens",
                0,
                "is the time scale of kind 'inverse_sqrt', which needs one",
                f"about 1 % of train_tokens: {train_tokens // 100:,}",
            )
        room -= warmup_tokens + self.cooldown_tokens
        if self.kind in ("wsd", "infinite") and self.final_decay_tokens(train_tokens, warmup_tokens) > room:
            cooldown = f" and cooldown_tokens = {self.cooldown_tokens:,}" if self.cooldown_tokens else ""
            yield Problem(
                "schedule.decay_tokens",
                self.decay_tokens,
                f"with warmup_tokens = {warmup_tokens:,}{cooldown} exceeds train_tokens = {train_tokens:,}",
                f"at most {max(0, room):,}",
            )

    def _kind_problems(self, optimizer: OptimizerConfig) -> Iterator[Problem]:
        """Which keys mean something to which kind."""
        if self.kind not in ("wsd", "infinite") and self.decay_tokens is not None:
            yield self._means_nothing("decay_tokens", self.decay_tokens, "schedule.kind: wsd")
        if self.kind == "infinite":
            if self.constant_lr is None or not optimizer.min_lr <= self.constant_lr <= optimizer.lr:
                yield Problem(
                    "schedule.constant_lr",
                    self.constant_lr,
                    "kind 'infinite' needs it, between min_lr and lr",
                    f"a value from {optimizer.min_lr:g} to {optimizer.lr:g}",
                )
            if optimizer.min_lr == 0:
                yield Problem(
                    "optimizer.min_lr", 0.0, "the exponential anneal of 'infinite' never reaches 0", "above 0"
                )
            return
        if self.constant_lr is not None:
            yield self._means_nothing("constant_lr", self.constant_lr, "schedule.kind: infinite")
        if self.cooldown_tokens:
            yield self._means_nothing("cooldown_tokens", self.cooldown_tokens, "schedule.kind: infinite")

    def _means_nothing(self, name: str, value: float, instead: str) -> Problem:
        return Problem(f"schedule.{name}", value, f"means nothing to kind {self.kind!r}", f"leave it out, or {instead}")
