"""From parts to datasets: join the parts in unit order, hash while copying, rename the manifest last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.corpus.dataset_writer import write_files
from megatron_cpt.corpus.manifest import Manifest, SourceRecord, TokenizerRecord
from megatron_cpt.corpus.parts import Array, UnitRecord, part_arrays


@dataclass(frozen=True)
class Assembly:
    """What is common to all datasets of one run."""

    staging: Path
    records: Sequence[UnitRecord]  # in unit order
    tokenizer: TokenizerRecord
    dtype: str
    append_eod: bool
    files_per_source: dict[str, int]
    rejects: dict[str, int]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """One of a split's three arrays over all units, re-iterable without holding it."""

    assembly: Assembly
    split: str
    column: int

    def __iter__(self) -> Iterator[Array]:
        for record in self.assembly.records:
            yield part_arrays(
                self.assembly.staging, record.unit, self.split, record.parts[self.split], self.assembly.dtype
            )[self.column]


def write_dataset(assembly: Assembly, split: str, prefix: str) -> Manifest:
    """Write the dataset of one split from the parts; an older dataset there is replaced."""
    counts = [record.parts[split] for record in assembly.records]
    template = Manifest(
        tool_version=__version__,
        complete=True,
        dtype=assembly.dtype,
        document_count=sum(c.documents for c in counts),
        sequence_count=sum(c.sequences for c in counts),
        token_count=sum(c.tokens for c in counts),
        input_bytes=sum(record.size_bytes for record in assembly.records),
        bin_bytes=0,
        idx_bytes=0,
        bin_sha256="",
        idx_sha256="",
        tokenizer=assembly.tokenizer,
        append_eod=assembly.append_eod,
        sources=_sources(assembly, split),
        rejects=assembly.rejects,
        config=assembly.config,
    )
    columns = (_Column(assembly, split, column) for column in range(3))
    return write_files(assembly.staging, split, prefix, template, *columns)


def _sources(assembly: Assembly, split: str) -> tuple[SourceRecord, ...]:
    total = sum(record.parts[split].tokens for record in assembly.records)
    sources = []
    for name, files in assembly.files_per_source.items():
        own = [record.parts[split] for record in assembly.records if record.source == name]
        tokens = sum(c.tokens for c in own)
        share = round(tokens / total, 6) if total else 0.0
        sources.append(SourceRecord(name, files, sum(c.documents for c in own), tokens, share))
    return tuple(sources)
