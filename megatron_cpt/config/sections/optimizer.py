"""`optimizer`: AdamW and its rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.parallel import ParallelConfig


class OptimizerConfig(Section):
    """AdamW and the two learning rates between which the schedule moves."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate.")
    min_lr: float = Field(5e-6, ge=0, description="Learning rate at the end of the schedule.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; not applied to norms and biases.")
    adam_beta1: float = Field(0.9, gt=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="Decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Term added to the denominator.")
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this; 0 switches it off.")
    cpu_offload_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of the optimizer state kept and updated in host memory; CUDA only."
    )
    moments_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="Storage of AdamW's moments; below fp32 needs TransformerEngine's optimizer."
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.min_lr > self.lr:
            yield Problem("optimizer.min_lr", self.min_lr, f"is above optimizer.lr = {self.lr}", f"at most {self.lr}")
        if self.moments_dtype != "fp32" and not run[ParallelConfig].distributed_optimizer:
            yield Problem(
                "optimizer.moments_dtype",
                self.moments_dtype,
                "needs the distributed optimizer",
                "parallel.distributed_optimizer: true, or fp32",
            )
