"""`recompute`: memory against time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Positive, Section, Sections
from megatron_cpt.config.sections.forgetting import ForgettingConfig


class RecomputeConfig(Section):
    """Activations that are computed again in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = Field(
        "none", description="`selective`: the modules below; `full`: whole layers, which keep only their input."
    )
    modules: tuple[Literal["core_attn", "mlp"], ...] = Field(
        ("mlp",),
        min_length=1,
        description="What `selective` recomputes. core_attn saves nothing under flash attention (TE, SDPA).",
    )
    loss_chunk_tokens: Positive | Literal["auto"] | None = Field(
        None,
        description="Tokens of a micro-batch whose logits exist at once; the backward pass computes them again. `auto` "
        "does so where the logits of a micro-batch take more than 2 GiB of a rank in fp32; null keeps them whole, as "
        "forgetting.kl needs them.",
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if isinstance(self.loss_chunk_tokens, int) and run[ForgettingConfig].active_kl is not None:
            yield Problem(
                "recompute.loss_chunk_tokens",
                self.loss_chunk_tokens,
                "forgetting.kl compares whole logits",
                "auto, or null; or leave out forgetting.kl",
            )
