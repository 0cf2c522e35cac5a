"""A corpus described once: the frozen schema of corpus.yaml, which the command line's flags also fill.

Unknown keys are errors with a near match; `load_corpus` reports all problems at once. Nothing here opens a
data file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from megatron_cpt.budget import parse_count
from megatron_cpt.config.field_problems import field_problems, known_keys
from megatron_cpt.config.foreign import refuse_run
from megatron_cpt.config.problems import Problem, raise_problems
from megatron_cpt.config.section import Section
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.corpus.schema_processing import Clean, Decontaminate, Dedup, Filters, switch

# What the product itself writes about a document in PREFIX.documents.jsonl.
OWN_FIELDS = frozenset({"document", "source", "file", "line"})


def field_name(key: str) -> str:
    """The name of a kept key in PREFIX.documents.jsonl; the product's own fields are never overwritten."""
    return f"metadata.{key}" if key in OWN_FIELDS else key


Format = Literal["auto", "jsonl", "parquet", "arrow", "csv", "tsv", "text", "html"]


class Source(Section):
    """One named source: which files, how to find the text in them."""

    name: str = Field("corpus", description="Name in the manifest, the report and reject records.")
    files: tuple[str, ...] = Field(
        (), description="Files, folders or globs, relative to the working directory; `-` is jsonl on standard input."
    )
    dataset: str | None = Field(None, description="Name in the registry file, instead of files.")
    format: Format = Field("auto", description="File format; auto goes by the file names.")
    text: str = Field("text", description="Key of the text: `text`, `meta.body`, or a template `{title}\\n\\n{body}`.")
    metadata: tuple[str, ...] = Field(
        (), description="Keys kept for each document in PREFIX.documents.jsonl, such as id and url."
    )

    clean: Clean | None = Field(None, description="Cleaning of this source instead of the corpus's.")
    filters: Filters | None = Field(None, description="Filters of this source instead of the corpus's.")

    @field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("files")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("has an empty name; for the working directory write .")
        return value

    @field_validator("metadata")
    @classmethod
    def _distinct_fields(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(key.strip() for key in value):
            raise ValueError("has an empty key")
        fields = [field_name(key) for key in value]
        if twice := [key for key, field in zip(value, fields, strict=True) if fields.count(field) > 1]:
            raise ValueError(f"{' and '.join(map(repr, twice))} would have one name in PREFIX.documents.jsonl")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("needs either files or dataset")
        return self


class Chunking(Section):
    """How documents are cut into sequences."""

    mode: Literal["documents", "tokens", "characters", "sentences"] = Field(
        "documents", description="documents: whole, packed at training; else windows of `size`."
    )
    size: int = Field(32_768, gt=0, description="Window length, in tokens (mode tokens) or characters.")
    overlap: int = Field(0, ge=0, description="Repeated from the window before, in the unit of size.")

    @model_validator(mode="after")
    def _advances(self) -> Chunking:
        if self.overlap >= self.size:
            raise ValueError(f"overlap {self.overlap} must be less than size {self.size}")
        if self.overlap and self.mode in ("documents", "sentences"):
            raise ValueError(f"mode {self.mode} has no overlap")
        return self


Fraction = Annotated[float, Field(gt=0, le=1)]


def split_fault(fractions: Mapping[str, float]) -> str | None:
    """Return what is wrong with the splits of a dataset (name -> fraction of its documents), None when nothing is."""
    for name, fraction in fractions.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            return f"the name {name!r} cannot be part of a file name: letters, digits, - and _ can"
        if not 0 < fraction <= 1:  # NaN is not in it either
            return f"the fraction {fraction:g} of {name!r} is not above 0 and at most 1"
    total = sum(fractions.values())
    return f"the fractions sum to {total:g}, not 1" if abs(total - 1) > 1e-9 else None


def _tokens(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


class Corpus(Section):
    """One corpus: its sources, the tokenizer, where the dataset goes."""

    output_prefix: str = Field(description="PREFIX of the files written: PREFIX.bin, .idx, .manifest.json.")
    tokenizer: str = Field(description="Model folder or tokenizer.json.")
    eod_token: str | None = Field(None, description="End-of-document token; null: see the guide's order.")
    append_eod: bool = Field(True, description="End each document with the end-of-document token.")
    post_processor: bool = Field(
        False, description="Add what the tokenizer adds to a text by itself, such as a beginning-of-sequence token."
    )
    special_tokens_in_text: Literal["literal", "parse", "reject"] = Field(
        "literal", description="A special token spelled in the text: plain text, the token, or a reject."
    )
    keep_empty_documents: bool = Field(
        False, description="Keep documents without text as documents without tokens, as Megatron-LM does."
    )
    sources: tuple[Source, ...] = Field(description="What to read, in this order.")
    split: dict[str, Fraction] = Field(
        default_factory=dict, description="Name -> fraction of documents; each gives PREFIX_NAME. Empty: one dataset."
    )
    clean: Clean = Field(Clean(), description="Changes to the text.")
    filters: Filters = Field(Filters(), description="Which documents stay.")
    dedup: Annotated[Dedup | None, BeforeValidator(switch)] = Field(None, description="Duplicates.")
    decontaminate: Decontaminate | None = Field(None, description="Overlap with evaluation sets.")
    chunking: Chunking = Field(Chunking(), description="Documents into sequences.")
    registry: str | None = Field(None, description="JSON or YAML file: dataset name -> {files, text, format}.")
    train_tokens: Annotated[int | None, BeforeValidator(_tokens)] = Field(
        None, gt=0, description="Tokens of the planned run, such as 1.5B, for the report's advice."
    )
    max_reject_ratio: float = Field(
        0.001, ge=0, le=1, description="Fail when more than this ratio of the documents cannot be read."
    )
    warn_filter_ratio: float = Field(
        0.1, ge=0, le=1, description="Warn when a filter drops more than this ratio of a source's documents."
    )
    max_document_seconds: float = Field(
        30, gt=0, description="Processor time of one document in a step of cleaning or filtering; over it, a reject."
    )
    max_document_bytes: int = Field(64 << 20, gt=0, description="Longer documents are rejected, in bytes.")

    @field_validator("output_prefix")
    @classmethod
    def _names_files(cls, value: str) -> str:
        if value.endswith("/"):
            raise ValueError("is a folder; add the name that the files begin with")
        return value

    @field_validator("split")
    @classmethod
    def _whole(cls, value: dict[str, float]) -> dict[str, float]:
        if value and (fault := split_fault(value)):
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _distinct_names(self) -> Corpus:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty")
        if len(set(names)) < len(names):
            raise ValueError("two sources have the same name")
        if self.post_processor and self.special_tokens_in_text == "reject":
            raise ValueError("post_processor adds special tokens; special_tokens_in_text: reject would drop all")
        if self.post_processor and self.chunking.mode in ("characters", "sentences"):
            raise ValueError(f"post_processor would begin every piece of chunking mode {self.chunking.mode}")
        if self.dedup is not None and (key := self.dedup.id_key) is not None:
            for source in self.sources:
                if key not in source.metadata:
                    raise ValueError(f"dedup.id_key {key!r} is not in metadata of source {source.name!r}")
        return self


def load_corpus(path: str | Path) -> Corpus:
    """Read corpus.yaml. Raises ConfigError that lists every problem with its place in the file."""
    return parse_corpus(read_yaml(Path(path), what="corpus", hint="examples/medical/corpus.yaml is one"), str(path))


def parse_corpus(raw: dict[str, Any], where: str) -> Corpus:
    """Validate a corpus; `where` names it in messages."""
    refuse_run(raw, where)
    try:
        return Corpus.model_validate(raw)
    except ValidationError as error:
        raise_problems(corpus_problems(error, Corpus), where)
        raise


def corpus_problems(error: ValidationError, model: type[Section]) -> list[Problem]:
    """Return what pydantic found in a part of a corpus."""
    return field_problems(error, tuple(known_keys(model)), what="corpus", page="docs/corpus-reference.md")
