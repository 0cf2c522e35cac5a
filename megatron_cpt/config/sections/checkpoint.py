"""`checkpoint`: what is kept on disk."""

from __future__ import annotations

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
    best_by: str | None = Field(
        None,
        description="Also keep the checkpoint with the lowest loss on this validation set (checkpoints/best.json).",
    )
    async_save: bool = Field(True, description="Write in the background while training goes on.")
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = Field(
        "fully_reshardable",
        description="How the distributed optimizer is stored. fully_reshardable loads under any layout, with 12 "
        "bytes per parameter of a model-parallel rank in host memory while it loads; dp_reshardable fixes tp and pp.",
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        known = list(run[DataConfig].validation)
        if self.best_by is not None and self.best_by not in known:
            yield Problem(
                "checkpoint.best_by",
                self.best_by,
                "is not a validation set",
                f"one of {known}" if known else "name held-out sets under data.validation",
            )
