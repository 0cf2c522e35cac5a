"""From parts to datasets: join the parts in unit order, hash while copying, rename the manifest last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt import __version__
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord, TokenizerRecord
from megatron_cpt.corpus.dataset.writer import write_files
from megatron_cpt.corpus.run.parts import Array, Encoded, PartCounts, UnitRecord, part_arrays


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
    keep: dict[tuple[int, str], Array]  # (unit, split) -> documents to keep, where not all are


@dataclass(frozen=True)
class _Column:
    """One of a split's three arrays over all units, re-iterable without holding it."""

    assembly: Assembly
    split: str
    column: int

    def __iter__(self) -> Iterator[Array]:
        for record in self.assembly.records:
            arrays = part_arrays(
                self.assembly.staging, record.unit, self.split, record.parts[self.split], self.assembly.dtype
            )
            keep = self.assembly.keep.get((record.unit, self.split))
            if keep is None:
                yield arrays[self.column]
            elif self.column == 2:
                yield arrays[2][keep]
            elif self.column == 1:
                yield arrays[1][np.repeat(keep, arrays[2])]
            else:
                yield from _kept_tokens(Encoded(*arrays), keep)


def _kept_tokens(encoded: Encoded, keep: Array) -> Iterator[Array]:
    """Ids of the kept documents, run by run, as views."""
    ends = np.concatenate(([0], np.cumsum(encoded.document_tokens())))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], keep.astype(np.int8), [0]))))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield encoded.ids[ends[begin] : ends[end]]


def kept_counts(assembly: Assembly, record: UnitRecord, split: str) -> PartCounts:
    """Documents, sequences and tokens of a part after the removal of duplicates."""
    keep = assembly.keep.get((record.unit, split))
    if keep is None:
        return record.parts[split]
    arrays = part_arrays(assembly.staging, record.unit, split, record.parts[split], assembly.dtype)
    encoded = Encoded(*arrays)
    return PartCounts(
        int(keep.sum()),
        int(encoded.sequences_per_document[keep].sum()),
        int(encoded.document_tokens()[keep].sum()),
    )


def write_dataset(assembly: Assembly, split: str, prefix: str) -> Manifest:
    """Write the dataset of one split from the parts; an older dataset there is replaced."""
    counts = [kept_counts(assembly, record, split) for record in assembly.records]
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
        sources=_sources(assembly, counts),
        rejects=assembly.rejects,
        config=assembly.config,
    )
    columns = (_Column(assembly, split, column) for column in range(3))
    return write_files(assembly.staging, split, prefix, template, *columns)


def _sources(assembly: Assembly, counts: Sequence[PartCounts]) -> tuple[SourceRecord, ...]:
    total = sum(part.tokens for part in counts)
    sources = []
    for name, files in assembly.files_per_source.items():
        own = [part for part, record in zip(counts, assembly.records, strict=True) if record.source == name]
        tokens = sum(part.tokens for part in own)
        share = round(tokens / total, 6) if total else 0.0
        sources.append(SourceRecord(name, files, sum(part.documents for part in own), tokens, share))
    return tuple(sources)
