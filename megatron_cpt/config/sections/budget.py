"""`budget`: how many tokens."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import Rounding, Steps, cut_budget
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections, Tokens
from megatron_cpt.config.sections.batch import BatchConfig


class BudgetConfig(Section):
    """How many tokens the run sees. Iterations and samples are derived, never typed."""

    train_tokens: Tokens = Field(1_638_400, description="Tokens to train on, counted from the start of the run.")
    warmup_tokens: Tokens = Field(163_840, description="Tokens over which the learning rate rises from 0 to lr.")
    rounding: Rounding = Field(
        "up",
        description="`up`: a last partial step is made whole, and that is printed; `exact`: a remainder is an error.",
    )

    def steps(self, batch: BatchConfig, consumed_tokens: int = 0) -> Steps:
        """Cut the budget into whole steps from `consumed_tokens` on, where the run stands."""
        return cut_budget(self.train_tokens, batch.size, batch.seq_length, consumed_tokens)

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if broken := self.steps(run[BatchConfig]).broken_rule(self.rounding):
            yield Problem("budget.train_tokens", self.train_tokens, *broken)
