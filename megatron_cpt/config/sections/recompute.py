"""`recompute`: memory against time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_cpt.config.section import Section


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
