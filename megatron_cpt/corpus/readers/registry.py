"""A registry of datasets by name: one JSON or YAML file, name -> where the files are and how to read them.

    {"pubmed": {"files": "pubmed/*.parquet", "text": "abstract"}, "wiki": {"file_name": "wiki.jsonl"}}

Keys are those of a source; `file_name` is accepted for `files` as in LLaMA-Factory's dataset_info.json. Paths are
relative to the registry file. A key stated in the source itself wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpt.config.problems import near_match, raise_problems
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.corpus.schema import Corpus, Source, corpus_problems
from megatron_cpt.errors import ConfigError


def resolve_datasets(corpus: Corpus) -> Corpus:
    """The corpus with every `dataset:` replaced by the registry's files."""
    if all(source.dataset is None for source in corpus.sources):
        return corpus
    if corpus.registry is None:
        raise ConfigError("a source names a dataset but there is no registry", hint="set registry: FILE")
    registry = Path(corpus.registry)
    entries = read_yaml(registry, what="registry", hint="it maps names to {files, text, format}")
    resolved = [_resolve(source, entries, registry) for source in corpus.sources]
    return corpus.model_copy(update={"sources": tuple(resolved)})


def _resolve(source: Source, entries: dict[str, Any], registry: Path) -> Source:
    if source.dataset is None:
        return source
    names = [str(name) for name in entries]
    if source.dataset not in entries:
        near = near_match(source.dataset, names)
        raise ConfigError(
            f"registry {registry} has no dataset {source.dataset!r}",
            hint=f"did you mean {near!r}?" if near else f"it has: {', '.join(names)}",
        )
    entry = entries[source.dataset]
    if not isinstance(entry, dict):
        raise ConfigError(
            f"registry {registry}: {source.dataset!r} is not a mapping", hint="write {files: ...} under it"
        )
    files = entry.get("files") or entry.get("file_name") or ()
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise ConfigError(
            f"registry {registry}, dataset {source.dataset!r}: files = {files!r} is not a list of names",
            hint="write one name, or a list of names",
        )
    other = {key: value for key, value in entry.items() if key not in ("files", "file_name")}
    stated = source.model_dump(exclude_unset=True, exclude={"dataset"})
    merged = {"name": source.dataset, **other, "files": [str(registry.parent / file) for file in files], **stated}
    try:
        return Source.model_validate(merged)
    except ValidationError as error:
        raise_problems(corpus_problems(error, Source), f"registry {registry}, dataset {source.dataset!r}")
        raise
