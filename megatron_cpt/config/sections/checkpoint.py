"""`checkpoint`: what is kept on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import Interval
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Every, Positive, Section, Sections
from megatron_cpt.config.sections.data import DataConfig


class CheckpointConfig(Section):
    """Which checkpoints are written and which are kept. The last step always saves."""

    branch_from: str | None = Field(
        None,
        description="Run folder or checkpoint of another run from which this run takes weights, optimizer, data "
        "position and token count when it starts: an anneal off a stable checkpoint, for example.",
    )
    save_every: Every | None = Field(
        Interval(1000, "iters"), validate_default=True, description="Interval between saves."
    )
    keep_last: Positive = Field(2, description="Newest checkpoints kept.")
    keep_every: Positive | None = Field(
        None, description="Also keep, for good, the first checkpoint at or after each multiple of this many tokens."
    )
    best_by: str | dict[str, float] | None = Field(
        None,
        description="Also keep the checkpoint with the lowest loss on this validation set, or with the lowest sum of "
        "losses with weights, such as {domain: 1, general: 1} (checkpoints/best.json).",
    )
    async_save: bool = Field(True, description="Write in the background while training goes on.")
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = Field(
        "fully_reshardable",
        description="How the distributed optimizer is stored. fully_reshardable loads under any layout, with 12 "
        "bytes per parameter of a model-parallel rank in host memory while it loads; dp_reshardable fixes tp and pp.",
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        known = list(run[DataConfig].validation)
        for name, weight in self.best_weights.items():
            if name not in known:
                hint = f"one of {known}" if known else "name held-out sets under data.validation"
                yield Problem("checkpoint.best_by", name, "is not a validation set", hint)
            if not (math.isfinite(weight) and weight > 0):
                yield Problem(f"checkpoint.best_by.{name}", weight, "is no weight", "a number above 0")
        if self.best_by == {}:
            yield Problem("checkpoint.best_by", self.best_by, "names no validation set", "null, or {NAME: 1}")

    @property
    def best_weights(self) -> dict[str, float]:
        """Weight of each validation set whose losses say which checkpoint is best; empty when none is kept."""
        if self.best_by is None:
            return {}
        return {self.best_by: 1.0} if isinstance(self.best_by, str) else dict(self.best_by)
