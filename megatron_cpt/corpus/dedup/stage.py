"""Duplicate detection within a run: references tokenised before, masks for the assembly, the account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import read_manifest
from megatron_cpt.corpus.dedup.duplicates import DocumentStore, Duplicates, find_duplicates
from megatron_cpt.corpus.dedup.records import RecordWriter, load_records
from megatron_cpt.corpus.documents import Batch
from megatron_cpt.corpus.readers.units import Unit
from megatron_cpt.corpus.run.parts import Array, Encoded, PartCounts, UnitRecord, part_arrays
from megatron_cpt.corpus.run.unit import Job
from megatron_cpt.corpus.run.workers import run_units
from megatron_cpt.errors import DataError

REFERENCE_DOCUMENTS_PER_UNIT = 4096
_UNIT_SHIFT, _DOCUMENT = np.uint64(32), np.uint64(0xFFFFFFFF)
REASONS = {"exact": "duplicate_exact", "near": "duplicate_near", "id": "duplicate_id"}


@dataclass(frozen=True)
class DedupResult:
    """What the assembly leaves out: per (unit, split) a mask of documents to keep, and the account."""

    keep: dict[tuple[int, str], Array] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    clusters: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())


PartLayout = tuple[tuple[str, PartCounts], ...]  # splits in order, with the counts of the unit's part


@dataclass(frozen=True)
class _PartTokens:
    """Documents of a unit of this run, in its parts."""

    staging: Path
    unit: int
    dtype: str
    parts: PartLayout

    def tokens(self, document: int) -> Array:
        split, within, arrays = _part_documents(self.staging, self.unit, self.dtype, self.parts)
        ids, offsets = arrays[int(split[document])]
        index = int(within[document])
        return ids[offsets[index] : offsets[index + 1]]


@lru_cache(maxsize=64)  # every mapped file holds a descriptor
def _part_documents(
    staging: Path, unit: int, dtype: str, parts: PartLayout
) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """(split of each document, its index within that split, per split the ids and token offsets)."""
    split = np.asarray(load_records(staging, f"{unit:06d}").documents["split"])
    within = np.zeros(len(split), np.int64)
    arrays = []
    for index, (name, counts) in enumerate(parts):
        within[split == index] = np.arange(int((split == index).sum()))
        ids, lengths, sequences = part_arrays(staging, unit, name, counts, dtype)
        tokens = Encoded(ids, lengths, sequences).document_tokens()
        arrays.append((ids, np.concatenate(([0], np.cumsum(tokens)))))
    return split, within, arrays


@dataclass(frozen=True)
class _ReferenceTokens:
    reader: IndexedReader
    first: int

    def tokens(self, document: int) -> Array:
        return self.reader.document(self.first + document)


def remove_duplicates(
    job: Job, units: Sequence[Unit], records: Sequence[UnitRecord], lines_before: Sequence[int], workers: int
) -> DedupResult:
    """Find the duplicates of the run's documents, among themselves and against the reference datasets."""
    dedup = job.corpus.dedup
    if dedup is None or not dedup.compares_documents:
        return DedupResult()
    references = _reference_units(job)
    list(run_units(partial(_map_reference, job), references, workers))
    names = [name for name, *_ in references] + [f"{unit.index:06d}" for unit in units]
    readers = [_ReferenceTokens(open_indexed(prefix), first) for _, prefix, first, _ in references]
    _part_documents.cache_clear()
    _records.cache_clear()
    parts = [
        _PartTokens(job.staging, record.unit, job.tokenizer.dtype, tuple((s, record.parts[s]) for s in job.splits))
        for record in records
    ]
    store = DocumentStore(job.staging, names, [*readers, *parts])
    duplicates = find_duplicates(store, dedup, workers)
    return _result(job, units, references, lines_before, duplicates)


Reference = tuple[str, str, int, int]  # record name, prefix, first document, one past the last


def _reference_units(job: Job) -> list[Reference]:
    assert job.corpus.dedup is not None
    units: list[Reference] = []
    for prefix in job.corpus.dedup.against:
        manifest = read_manifest(prefix)
        if manifest.tokenizer.fingerprint != job.tokenizer.fingerprint:
            raise DataError(
                f"dedup.against: {prefix} was written with another tokenizer ({manifest.tokenizer.name})",
                hint="preprocess it with this corpus's tokenizer, or leave it out",
            )
        for first in range(0, manifest.document_count, REFERENCE_DOCUMENTS_PER_UNIT):
            last = min(first + REFERENCE_DOCUMENTS_PER_UNIT, manifest.document_count)
            units.append((f"r{len(units):06d}", prefix, first, last))
    return units


def _map_reference(job: Job, reference: Reference) -> None:
    """Records of documents of a reference dataset: their text is decoded for the exact keys."""
    name, prefix, first, last = reference
    assert job.corpus.dedup is not None
    reader, eod = open_indexed(prefix), job.tokenizer.eod_id
    documents = [np.asarray(reader.document(i)) for i in range(first, last)]
    texts = [job.tokenizer.decode(ids[ids != eod].tolist()) for ids in documents]
    lengths = np.array([len(ids) for ids in documents])
    encoded = Encoded(np.concatenate(documents), lengths[lengths > 0], (lengths > 0).astype(np.int64))
    metadata: list[dict[str, Any]] = [{str(job.corpus.dedup.id_key): None} for _ in texts]
    batch = Batch(prefix, texts, list(range(first + 1, last + 1)), metadata)
    writer = RecordWriter(job.corpus.dedup)
    writer.add(batch, encoded, np.zeros(len(texts), np.uint8), 0)
    writer.save(job.staging, name)


def _result(
    job: Job, units: Sequence[Unit], references: Sequence[Reference], lines_before: Sequence[int], found: Duplicates
) -> DedupResult:
    """Masks by unit and split, counts by reason, and one entry per cluster with the places of its documents."""
    own = found.dropped >> _UNIT_SHIFT >= len(references)  # a reference that equals another is nobody's concern
    found = Duplicates(found.dropped[own], found.kept[own], found.kinds[own], found.kind_names)
    of_reference = found.kept >> _UNIT_SHIFT < len(references)
    counts = Counter({"duplicate_of_reference": int(of_reference.sum())})
    by_kind = np.bincount(found.kinds[~of_reference], minlength=len(found.kind_names)).tolist()
    counts.update({REASONS[kind]: count for kind, count in zip(found.kind_names, by_kind, strict=True)})
    keep: dict[tuple[int, str], Array] = {}
    positions, begins = np.unique(found.dropped >> _UNIT_SHIFT, return_index=True)
    for position, documents in zip(positions.tolist(), _cut(found.dropped, begins), strict=True):
        unit = units[position - len(references)]
        split = load_records(job.staging, f"{unit.index:06d}").documents["split"]
        wanted = np.ones(len(split), bool)
        wanted[(documents & _DOCUMENT).astype(np.int64)] = False
        for number, name in enumerate(job.splits):
            keep[unit.index, name] = wanted[split == number]
    clusters = partial(_clusters, job, units, references, lines_before, found)
    return DedupResult(keep, {reason: count for reason, count in counts.most_common() if count}, clusters)


def _cut(array: Array, begins: Array) -> Iterator[Array]:
    """The pieces of `array` that begin at `begins`."""
    ends = np.append(begins, len(array))[1:]
    return (array[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True))


def _clusters(
    job: Job, units: Sequence[Unit], references: Sequence[Reference], lines_before: Sequence[int], found: Duplicates
) -> Iterator[dict[str, Any]]:
    """One entry per cluster, by the document that stays; made one by one, for there may be many."""

    def place(node: int) -> dict[str, Any]:
        index, document = node >> 32, node & 0xFFFFFFFF
        if index < len(references):
            _, prefix, first, _ = references[index]
            return {"dataset": prefix, "document": first + document}
        unit = units[index - len(references)]
        row = _records(job.staging, unit.index)[document]
        line = int(row["place"]) + lines_before[index - len(references)]
        return {"source": unit.source, "file": unit.paths[int(row["path"])], "line": line}

    order = np.lexsort((found.dropped, found.kept))
    kept, begins = np.unique(found.kept[order], return_index=True)
    for node, members in zip(kept.tolist(), _cut(order, begins), strict=True):
        is_reference = node >> 32 < len(references)
        dropped = [
            place(int(found.dropped[i]))
            | {"reason": "duplicate_of_reference" if is_reference else REASONS[found.kind_names[found.kinds[i]]]}
            for i in members
        ]
        yield {"kept": place(node), "dropped": dropped}


@lru_cache(maxsize=64)
def _records(staging: Path, unit: int) -> Array:
    return load_records(staging, f"{unit:06d}").documents
