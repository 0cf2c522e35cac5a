"""A registry of datasets by name: one JSON or YAML file, name -> where the files are and how to read them.

    {"pubmed": {"files": "pubmed/*.parquet", "text": "abstract"}, "wiki": {"file_name": "wiki.jsonl"}}

Keys are those of a source; `file_name` is accepted for `files` as in LLaMA-Factory's dataset_info.json. Paths are
relative to the registry file. A key stated in the source itself wins.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.errors import ConfigError


def resolve_datasets(corpus: Corpus) -> Corpus:
    """The corpus with every `dataset:` replaced by the registry's files."""
    if all(source.dataset is None for source in corpus.sources):
        return corpus
    if corpus.registry is None:
        raise ConfigError("a source names a dataset but there is no registry", hint="set registry: FILE")
    entries = _read(Path(corpus.registry))
    resolved = [_resolve(source, entries, Path(corpus.registry)) for source in corpus.sources]
    return corpus.model_copy(update={"sources": tuple(resolved)})


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"registry {path}: {error}", hint="give a JSON or YAML file") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"registry {path} holds no names", hint="it maps names to {files, text, format}")
    return entries


def _resolve(source: Source, entries: dict[str, Any], registry: Path) -> Source:
    if source.dataset is None:
        return source
    if source.dataset not in entries:
        near = difflib.get_close_matches(source.dataset, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(map(str, entries))}"
        raise ConfigError(f"registry {registry} has no dataset {source.dataset!r}", hint=hint)
    if not isinstance(entries[source.dataset], dict):
        raise ConfigError(
            f"registry {registry}: {source.dataset!r} is not a mapping", hint="write {files: ...} under it"
        )
    entry = dict(entries[source.dataset])
    files = entry.pop("files", None) or entry.pop("file_name", None) or ()
    files = (files,) if isinstance(files, str) else tuple(files)
    stated = source.model_dump(exclude_unset=True, exclude={"dataset"})
    merged = {"name": source.dataset, **entry, "files": [str(registry.parent / f) for f in files], **stated}
    try:
        return Source.model_validate(merged)
    except ValueError as error:
        raise ConfigError(
            f"registry {registry}, dataset {source.dataset!r}: {error}", hint="keys are a source's"
        ) from None
