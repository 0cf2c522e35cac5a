"""`lora`: train low-rank adapters in place of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import LINEAR_NAMES, LinearName
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.model import ModelConfig
from megatron_cpt.config.sections.precision import PrecisionConfig

_ALL = ("all", "all-linear", True)  # of LLaMA-Factory, of peft, and of axolotl's lora_target_linear


def _targets(value: Any) -> Any:
    if not isinstance(value, list | tuple | set):
        if value in _ALL:
            return LINEAR_NAMES
        value = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if isinstance(value, list | tuple | set) and all(name in LINEAR_NAMES for name in value):
        return tuple(name for name in LINEAR_NAMES if name in value)  # one order, so that equal sets are equal
    return value


_TARGETS_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string", "enum": list(LINEAR_NAMES)}, "minItems": 1},
        ]
    }
)
Targets = Annotated[tuple[LinearName, ...], BeforeValidator(_targets), Field(min_length=1), _TARGETS_SCHEMA]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., arXiv:2106.09685): with a rank, they are trained and all weights stay frozen."""

    rank: int | None = Field(None, ge=1, description="Rank of every adapter; unset trains all weights instead.")
    alpha: float = Field(
        32.0, gt=0, allow_inf_nan=False, description="An adapter's output counts alpha / rank times, as in peft."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of an adapter's input.")
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (rank-stabilised, Kalajdzievski, arXiv:2312.03732)."
    )
    targets: Targets = Field(
        LINEAR_NAMES,
        description="Which linears of every layer, by their Hugging Face names: `all`, or a list of q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj.",
    )

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank is not None

    @property
    def scale(self) -> float:
        """What the output of an adapter is multiplied by."""
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.rank is None:
            if self != type(self)():
                yield Problem("lora.rank", None, "is missing, and the other keys of lora need it", "such as 16")
            return
        if run[ModelConfig].attention == "te":
            yield Problem(
                "model.attention",
                "te",
                "fuses the norms into the linear layers, where an adapter cannot read its input",
                "auto or sdpa; or leave lora out",
            )
        if run[PrecisionConfig].fp8 is not None:
            yield Problem(
                "precision.fp8", run[PrecisionConfig].fp8, "does not go with adapters", "leave fp8 or lora out"
            )
