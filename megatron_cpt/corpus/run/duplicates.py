"""Duplicate documents of a run: reference datasets join in, masks for the assembly come out, with counts and places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.soundness import open_dataset, open_proven
from megatron_cpt.corpus.dedup.dedup_datasets import DocumentRange, encoded_documents, ranges_of
from megatron_cpt.corpus.dedup.duplicates import DocumentStore, Duplicates, documents_of, find_duplicates
from megatron_cpt.corpus.dedup.records import RecordWriter
from megatron_cpt.corpus.documents import Batch
from megatron_cpt.corpus.run.corpus_run import CorpusRun
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.parts import part_path
from megatron_cpt.corpus.workers import run_units
from megatron_cpt.errors import DataError

_UNIT_SHIFT, _DOCUMENT = np.uint64(32), np.uint64(0xFFFFFFFF)
REASONS = {"exact": "duplicate_exact", "near": "duplicate_near", "id": "duplicate_id"}


@dataclass(frozen=True)
class DedupResult:
    """What the assembly leaves out: per (unit, split) a mask of documents to keep, counts by reason, and the places."""

    keep: dict[tuple[str, str], Array] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    clusters: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())


@dataclass(frozen=True)
class _PartTokens:
    """Documents of a unit of this run, in its parts."""

    staging: Path
    unit: str
    dtype: str
    splits: tuple[str, ...]

    def tokens(self, document: int) -> Array:
        row = documents_of(self.staging, self.unit)[document]
        path = part_path(self.staging, self.unit, self.splits[int(row["split"])])
        start = int(row["first_token"]) * np.dtype(self.dtype).itemsize
        ids: Array = np.fromfile(path, self.dtype, int(row["tokens"]), offset=start)  # holds no descriptor
        return ids


def remove_duplicates(run: CorpusRun, done: FinishedUnits) -> DedupResult:
    """Find the duplicates of the run's documents, among themselves and against the reference datasets."""
    dedup = run.corpus.dedup
    if dedup is None or not dedup.compares_documents:
        return DedupResult()
    run.begin("find duplicates", f"{done.documents_read - sum(done.reject_counts.values()):,} documents")
    references = _reference_ranges(run)
    list(run_units(partial(_write_records, run), references, run.workers))
    parts = [_PartTokens(run.staging, record.unit, run.tokenizer.dtype, tuple(run.splits)) for record in done.records]
    names = [*(reference.name for reference in references), *(unit.name for unit in done.units)]
    store = DocumentStore(run.staging, names, [*references, *parts])
    return _result(run, done, references, find_duplicates(store, dedup, run.workers))


def check_references(run: CorpusRun) -> None:
    """Look at the reference datasets before the work starts, as far as it costs no pass over them.

    Raises:
        DataError: one is not there, its index is damaged, or another tokenizer wrote it.
    """
    for prefix in run.corpus.dedup.against if run.corpus.dedup else ():
        manifest, _ = open_dataset(prefix)
        if manifest.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise DataError(
                f"dedup.against: {prefix} was written with another tokenizer ({manifest.tokenizer.name})",
                hint="preprocess it with this corpus's tokenizer, or leave it out",
            )


def _reference_ranges(run: CorpusRun) -> list[DocumentRange]:
    assert run.corpus.dedup is not None
    _, readers = open_proven(run.corpus.dedup.against)
    named = enumerate(readers)
    return [part for number, reader in named for part in ranges_of(reader, f"r{number:03d}-{{:09d}}")]


def _write_records(run: CorpusRun, reference: DocumentRange) -> None:
    """Records of documents of a reference dataset: their text is decoded for the exact keys."""
    assert run.corpus.dedup is not None
    eod, documents = run.tokenizer.eod_id, reference.documents()
    texts = [run.tokenizer.decode(ids[ids != eod].tolist()) for ids in documents]
    metadata: list[dict[str, Any]] = [{str(run.corpus.dedup.id_key): None} for _ in texts]
    batch = Batch(reference.reader.prefix, texts, list(range(reference.first + 1, reference.last + 1)), metadata)
    writer = RecordWriter(run.corpus.dedup)
    writer.add(batch, encoded_documents(documents), np.zeros(len(texts), np.uint8), 0)
    writer.save(run.staging, reference.name)


def _result(run: CorpusRun, done: FinishedUnits, references: Sequence[DocumentRange], found: Duplicates) -> DedupResult:
    """Masks by unit and split, counts by reason, and one entry per cluster with the places of its documents."""
    own = found.dropped >> _UNIT_SHIFT >= len(references)  # duplicates among the references themselves are ignored
    found = Duplicates(found.dropped[own], found.kept[own], found.kinds[own], found.kind_names)
    of_reference = found.kept >> _UNIT_SHIFT < len(references)
    counts = Counter({"duplicate_of_reference": int(of_reference.sum())})
    by_kind = np.bincount(found.kinds[~of_reference], minlength=len(found.kind_names)).tolist()
    counts.update({REASONS[kind]: count for kind, count in zip(found.kind_names, by_kind, strict=True)})
    keep: dict[tuple[str, str], Array] = {}
    positions, begins = np.unique(found.dropped >> _UNIT_SHIFT, return_index=True)
    for position, documents in zip(positions.tolist(), _cut(found.dropped, begins), strict=True):
        unit = done.units[position - len(references)]
        split = documents_of(run.staging, unit.name)["split"]
        wanted = np.ones(len(split), bool)
        wanted[(documents & _DOCUMENT).astype(np.int64)] = False
        for number, name in enumerate(run.splits):
            keep[unit.name, name] = wanted[split == number]
    clusters = partial(_clusters, run, done, references, found)
    return DedupResult(keep, {reason: count for reason, count in counts.most_common() if count}, clusters)


def _cut(array: Array, begins: Array) -> Iterator[Array]:
    """The pieces of `array` that begin at `begins`."""
    ends = np.append(begins, len(array))[1:]
    return (array[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True))


def _clusters(
    run: CorpusRun, done: FinishedUnits, references: Sequence[DocumentRange], found: Duplicates
) -> Iterator[dict[str, Any]]:
    """One entry per cluster, by the document that stays; made one by one, for there may be many."""

    def place(node: int) -> dict[str, Any]:
        index, document = node >> 32, node & 0xFFFFFFFF
        if index < len(references):
            return {"dataset": references[index].reader.prefix, "document": references[index].first + document}
        index -= len(references)
        unit = done.units[index]
        row = documents_of(run.staging, unit.name)[document]
        line = int(row["place"]) + done.lines_before[index]
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
