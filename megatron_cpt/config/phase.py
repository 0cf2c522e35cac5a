"""What one stretch of a run trains with. Schedule, blend and batch take a `Phase`, never the whole config.

A run has one phase today. A run of several differs from that in `phase_at` alone: another answer for another token.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.budget import BatchSize
from megatron_cpt.config.mix import MixPiece
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.optimizer import OptimizerConfig
from megatron_cpt.config.sections.schedule import ScheduleConfig


@dataclass(frozen=True)
class Phase:
    """Batch, learning rate and blend of a stretch of the run. Tokens count from the start of the run."""

    end_tokens: int  # of the last whole step
    warmup_tokens: int
    seq_length: int
    batch_size: BatchSize
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    mix: tuple[MixPiece, ...]  # the sources' shares

    @property
    def decay_tokens(self) -> int:
        """Tokens of the final decay."""
        return self.schedule.final_decay_tokens(self.end_tokens, self.warmup_tokens)


def phase_at(config: RunConfig, consumed_tokens: int = 0) -> Phase:
    """Return what the step after `consumed_tokens` trains with. A pure function: nothing is kept between steps."""
    return Phase(
        end_tokens=config.steps(consumed_tokens).train_tokens,
        warmup_tokens=config.budget.warmup_tokens,
        seq_length=config.batch.seq_length,
        batch_size=config.batch.size,
        schedule=config.schedule,
        optimizer=config.optimizer,
        mix=config.data.mix(),
    )
