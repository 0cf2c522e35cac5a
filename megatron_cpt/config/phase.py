"""What one stretch of a run trains with. Schedule, blend and batch take a `Phase`, never the whole config."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.budget import BatchSize
from megatron_cpt.config.mix import MixPiece
from megatron_cpt.config.sections.optimizer import OptimizerConfig
from megatron_cpt.config.sections.schedule import ScheduleConfig


@dataclass(frozen=True)
class Phase:
    """Batch, learning rate and blend of a stretch of the run. Tokens count from the start of the run."""

    name: str  # empty in a run without phases
    end_tokens: int  # of the stretch; of the last one where its last whole step ends
    rate_end_tokens: int  # where the learning rate has come down: the end of the stretch or of the run
    warmup_tokens: int
    seq_length: int
    batch_size: BatchSize
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    mix: tuple[MixPiece, ...]  # the sources' shares
    stops: bool = False  # the run ends after it, although its budget does not

    @property
    def decay_tokens(self) -> int:
        """Tokens of the final decay."""
        return self.schedule.final_decay_tokens(self.rate_end_tokens, self.warmup_tokens)
