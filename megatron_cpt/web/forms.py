"""Forms made from the schemas: each key with its description, its default and what may be entered."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic_core import PydanticUndefined

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.section import Section
from megatron_cpt.corpus.schema import Corpus, Source

Kind = Literal["text", "choice", "switch", "yaml", "rows", "pairs"]
# What a first form shows; the rest is folded away by section.
RUN_BASICS = (
    "job_name", "model.init_from", "data.train", "data.validation", "budget.train_tokens", "budget.warmup_tokens",
    "batch.seq_length", "batch.micro_batch_size", "batch.global_batch_size", "optimizer.lr", "optimizer.min_lr",
    "schedule.kind", "parallel.tp", "parallel.pp", "parallel.nodes", "parallel.gpus_per_node", "precision.dtype",
    "checkpoint.save_every", "eval.every",
)  # fmt: skip
CORPUS_BASICS = ("output_prefix", "tokenizer", "sources", "split", "filters.preset", "dedup")


@dataclass(frozen=True)
class FormField:
    """One input of a form.

    Attributes:
        path: the dotted key.
        kind: how it is entered; `yaml` is any value in YAML, `rows` a list of small records, `pairs` name -> text.
        columns: of `rows`, the keys of one record.
        verbatim: the text is the value; else it is read as YAML.
    """

    path: str
    kind: Kind
    description: str
    default: str
    required: bool
    choices: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    verbatim: bool = False

    @property
    def label(self) -> str:
        return self.path.replace(".", ": ").replace("_", " ")


@dataclass(frozen=True)
class FormSection:
    """The inputs of one section of a schema."""

    name: str
    description: str
    fields: tuple[FormField, ...]


def run_form() -> list[FormSection]:
    """Return the form of a run's config: the basics first, then everything else by section."""
    return _form(RunConfig, RUN_BASICS, "run")


def corpus_form() -> list[FormSection]:
    """Return the form of a corpus."""
    return _form(Corpus, CORPUS_BASICS, "corpus")


def _form(model: type[Section], basics: tuple[str, ...], name: str) -> list[FormSection]:
    fields = {field.path: field for field in _fields(model)}
    first = FormSection("basics", f"What every {name} needs.", tuple(fields[path] for path in basics if path in fields))
    rest: dict[str, list[FormField]] = {}
    for path, field in fields.items():
        if path not in basics:
            rest.setdefault(path.rpartition(".")[0] or "other", []).append(field)
    texts = {key: _section(info.annotation) for key, info in model.model_fields.items()}
    return [
        first,
        *(
            FormSection(key, ((texts.get(key) or model).__doc__ or "").strip().splitlines()[0], tuple(inputs))
            for key, inputs in rest.items()
        ),
    ]


def _fields(model: type[Section], prefix: str = "") -> Iterator[FormField]:
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section is not None and not prefix and not _is_optional(info.annotation):
            yield from _fields(section, f"{name}.")
        else:
            yield _field(prefix + name, info)


def _field(path: str, info: pydantic.fields.FieldInfo) -> FormField:
    kind, choices = _kind(info.annotation)
    records = _records(info.annotation)
    columns: tuple[str, ...] = ()
    if records is not None:
        kind, columns = "rows", tuple(_columns(records))
    return FormField(
        path=path,
        kind=kind,
        description=info.description or "",
        default=_default_text(info),
        required=info.is_required(),
        choices=choices,
        columns=columns,
        verbatim=_plain(info.annotation) is str,
    )


def _columns(record: type[Section]) -> Iterator[str]:
    for name in record.model_fields:
        if record is Source and name not in ("name", "files", "format", "text"):
            continue
        yield name


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    annotation = _plain(annotation)
    if typing.get_origin(annotation) is Literal:
        return "choice", tuple(str(value) for value in typing.get_args(annotation))
    if annotation is bool:
        return "switch", ("true", "false")
    if typing.get_origin(annotation) is dict and typing.get_args(annotation)[1] in (str, float):
        return "pairs", ()
    if annotation in (str, int, float) or (isinstance(annotation, type) and not issubclass(annotation, Section)):
        return "text", ()
    return "yaml", ()


def _plain(annotation: Any) -> Any:
    """The type without None and without what pydantic adds to it."""
    inner = [part for part in _union(annotation) if part is not type(None)]
    if len(inner) == 1:
        annotation = inner[0]
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_optional(annotation: Any) -> bool:
    return type(None) in _union(annotation)


def _section(annotation: Any) -> type[Section] | None:
    found = [part for part in _union(annotation) if isinstance(part, type) and issubclass(part, Section)]
    return found[0] if found else None


def _records(annotation: Any) -> type[Section] | None:
    """The class of the items, where a value is a list of records."""
    if typing.get_origin(annotation) is not tuple:
        return None
    return _section(typing.get_args(annotation)[0])


def _default_text(info: pydantic.fields.FieldInfo) -> str:
    """The default as it would be entered; empty for none."""
    default = info.default
    if default is PydanticUndefined or default is None or info.default_factory is not None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Section) or default == ():
        return ""
    if isinstance(default, tuple):
        return "[" + ", ".join(map(str, default)) + "]"
    return str(default)
