"""What a run writes: the size of a checkpoint, how many lie there at once, and how often one is written."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import trainable_of


@dataclass(frozen=True)
class DiskNeed:
    """Bytes and numbers of checkpoints."""

    checkpoint_bytes: int
    saves: int  # over the whole run
    kept: int  # most that lie there at once, the one being written included

    @property
    def peak_bytes(self) -> int:
        return self.kept * self.checkpoint_bytes


def disk_need(config: RunConfig, arch: Architecture, derived: Derived) -> DiskNeed:
    """Return what the retention policy of `config` asks of the storage."""
    saves = saves_of_run(config, derived.train_iters, derived.tokens_per_step)
    return DiskNeed(trainable_of(config, arch).checkpoint_bytes(), saves, _kept(config, saves))


def saves_of_run(config: RunConfig, train_iters: int, tokens_per_step: int) -> int:
    """Return how many checkpoints the run writes: one at each interval, and one at its last step."""
    interval = config.checkpoint.save_every
    if interval is None:
        return 1
    save_iters = interval.count if interval.unit == "iters" else max(1, interval.count // tokens_per_step)
    return -(-train_iters // save_iters)


def _kept(config: RunConfig, saves: int) -> int:
    """What the retention keeps, the best one, and the one being written."""
    checkpoint = config.checkpoint
    multiples = config.budget.train_tokens // checkpoint.keep_every if checkpoint.keep_every else 0
    return min(saves, checkpoint.keep_last + multiples + len(config.phases) + (checkpoint.best_by is not None) + 1)
