"""`eval`: perplexity while training."""

from __future__ import annotations

from pydantic import Field

from megatron_cpt.config.section import Every, Positive, Section


class EvalConfig(Section):
    """Perplexity on the validation sets inside the loop."""

    every: Every | None = Field(None, description="Interval; the first and the last step always evaluate.")
    tokens: Positive | None = Field(None, description="Tokens per validation set; default: the whole set.")
