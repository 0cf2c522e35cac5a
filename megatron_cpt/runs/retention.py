"""Which complete checkpoints of a run stay: one rule for the job that saves and for `checkpoints --prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runs.marker import Marker


@dataclass(frozen=True)
class Retention:
    """Kept: the newest, the first at or after each multiple of some tokens and each end of a phase, the best one."""

    keep_last: int
    keep_every_tokens: int | None = None
    phase_ends: tuple[int, ...] = ()  # tokens of the run

    @classmethod
    def from_config(cls, config: RunConfig) -> Retention:
        return cls(config.checkpoint.keep_last, config.checkpoint.keep_every, config.phase_ends)

    def removable(self, saved: Sequence[tuple[Path, Marker]], best_iteration: int | None) -> list[Path]:
        """Return those of `saved` (complete checkpoints, newest first) that need not stay."""
        kept = {path for path, _ in saved[: self.keep_last]}
        kept |= {path for path, marker in saved if marker.iteration == best_iteration}
        if self.keep_every_tokens is not None:
            seen: set[int] = set()
            for path, marker in reversed(saved):  # oldest first
                multiple = marker.consumed_tokens // self.keep_every_tokens
                if multiple > 0 and multiple not in seen:
                    kept.add(path)
                seen.add(multiple)
        for end in self.phase_ends:
            kept |= {path for path, _ in [saved_at for saved_at in saved if saved_at[1].consumed_tokens >= end][-1:]}
        return [path for path, _ in saved if path not in kept]
