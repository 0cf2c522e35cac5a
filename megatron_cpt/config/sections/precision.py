"""`precision`: number formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.model import ModelConfig


class PrecisionConfig(Section):
    """Number formats of weights, activations and matrix products."""

    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="Weights and activations; master weights and gradient sums are fp32 either way."
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None, description="fp8 matrix products of TransformerEngine, with per-tensor current scaling; CUDA only."
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.fp8 is not None and (run[ModelConfig].attention not in ("auto", "te") or self.dtype != "bf16"):
            yield Problem(
                "precision.fp8",
                self.fp8,
                "is TransformerEngine's, around bf16 weights",
                "model.attention: auto or te and precision.dtype: bf16; or leave fp8 out",
            )
