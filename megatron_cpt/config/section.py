"""The base of every section of a config, and the types of its fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import Interval, parse_count
from megatron_cpt.config.problems import Problem


def _count(value: Any) -> Any:
    return value if value is None else parse_count(value)


def _interval(value: Any) -> Any:
    return value if value is None else Interval.parse(value)


def _share(value: Any) -> Any:
    """'3 %' -> 0.03; a bare number is a share already, and must look like one."""
    if isinstance(value, str):
        number = value.strip()
        if number.endswith("%"):
            return float(number.removesuffix("%")) / 100
        value = float(number)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
        raise ValueError(f"{value:g} may be meant as per cent or as a factor; write {value:g} % or {value / 100:g}")
    return value


# What an editor may accept in a YAML file (docs/config.schema.json): a count may be written as text, such as 1.5B.
_COUNT_SCHEMA = WithJsonSchema({"type": ["integer", "string"], "pattern": r"^\s*\d[\d_,]*(\.\d+)?\s*[KkMmBbTt]?\s*$"})
_INTERVAL_PATTERN = r"^.*\d.*\s*(tokens?|iters?|iterations?|steps?)\s*$"

Tokens = Annotated[int, BeforeValidator(_count), Field(ge=0), _COUNT_SCHEMA]
Every = Annotated[
    Interval,
    BeforeValidator(_interval),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _INTERVAL_PATTERN, "examples": ["100M tokens", "1000 iters"]}),
]
Share = Annotated[
    float,
    BeforeValidator(_share),
    WithJsonSchema({"type": ["number", "string"], "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$", "examples": ["3 %", 0.03]}),
]
Positive = Annotated[int, BeforeValidator(_count), Field(ge=1), _COUNT_SCHEMA]


class Section(BaseModel):
    """A frozen group of keys in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        """Yield every rule that this section breaks together with the others.

        Args:
            run: the sections of the whole run; `self` is one of them.
            arch: the model, None while it is unknown: rules that need it are then left out.
        """
        return iter(())


S = TypeVar("S", bound=Section)


class Sections:
    """The sections of one run, each found by its class: `run[BatchConfig]`.

    A section names the classes that its rules look at, so the files of the sections import one another in one
    direction only, and none imports the whole.
    """

    def __init__(self, sections: Iterable[Section]) -> None:
        self._by_class = {type(section): section for section in sections}

    def __getitem__(self, kind: type[S]) -> S:
        section = self._by_class[kind]
        assert isinstance(section, kind)
        return section

    def __iter__(self) -> Iterator[Section]:
        return iter(self._by_class.values())
