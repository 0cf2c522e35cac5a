"""The base of every section of a config, and the types of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from megatron_cpt.budget import Interval, parse_count

if TYPE_CHECKING:
    from megatron_cpt.architecture.facts import Architecture
    from megatron_cpt.config.problems import Problem
    from megatron_cpt.config.run_config import RunConfig


def _count(value: Any) -> Any:
    return value if value is None else parse_count(value)


def _interval(value: Any) -> Any:
    return value if value is None else Interval.parse(value)


Tokens = Annotated[int, BeforeValidator(_count), Field(ge=0)]
Every = Annotated[Interval, BeforeValidator(_interval), PlainSerializer(str, return_type=str)]
Positive = Annotated[int, BeforeValidator(_count), Field(ge=1)]


class Section(BaseModel):
    """A frozen group of keys in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def problems(self, config: RunConfig, arch: Architecture | None) -> Iterator[Problem]:
        """Yield every rule that this section breaks together with the rest of `config`.

        Args:
            config: the whole run; `self` is one of its sections.
            arch: the model, None while it is unknown: rules that need it are then left out.
        """
        return iter(())
