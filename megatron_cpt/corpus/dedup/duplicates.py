"""Duplicate documents over the whole corpus: bucket, verify, cluster. The map stage is in `records`.

    map       each unit leaves sorted keys of its documents (with the tokens, in one pass over the text)
    bucket    for one kind of key and one range of keys: documents with equal keys, verified, become edges
    cluster   edges are joined to clusters; the first document in input order stays
    filter    `assemble` leaves the others out when it joins the parts

Memory: a bucket holds at most DOCUMENTS_PER_BUCKET keys; clusters hold about 100 bytes per document that has a
duplicate, nothing of the others. The result depends only on the documents, not on workers or buckets.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_cpt.corpus.arrays import Array, sorted_unique
from megatron_cpt.corpus.dedup.records import NO_KEY, UnitRecords, key_kinds, load_documents, load_records
from megatron_cpt.corpus.dedup.signatures import jaccard, shingle_set
from megatron_cpt.corpus.schema_processing import Dedup
from megatron_cpt.corpus.workers import run_units

DOCUMENTS_PER_BUCKET = 2 << 20
# Each document of a group of equal keys is compared with at most this many distinct earlier documents.
LEADERS_PER_GROUP = 8
SHINGLE_SETS_KEPT = 1024
VERDICTS_KEPT = 1 << 21  # 32 MiB in each worker
EDGES_JOINED = 1 << 18
_UNIT_SHIFT = np.uint64(32)


class TokenReader(Protocol):
    """Token ids of the documents of one unit."""

    def tokens(self, document: int) -> Array: ...


@dataclass(frozen=True)
class DocumentStore:
    """All units that take part, in input order: their record files, and how to get a document's token ids."""

    folder: Path
    units: Sequence[str]  # names of record files; those of reference datasets come first
    token_readers: Sequence[TokenReader]


@dataclass(frozen=True)
class Bucket:
    kind: str
    row: int
    low: int  # keys in [low, high)
    high: int


@dataclass(frozen=True)
class Duplicates:
    """Pairs (document, the one that stays), as unit << 32 | document, sorted by document; and why."""

    dropped: Array
    kept: Array
    kinds: Array  # u8, index of a name
    kind_names: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Documents dropped by kind, most first."""
        found = np.bincount(self.kinds, minlength=len(self.kind_names)).tolist()
        return dict(Counter(dict(zip(self.kind_names, found, strict=True))).most_common())


def find_duplicates(store: DocumentStore, dedup: Dedup, workers: int) -> Duplicates:
    """All documents to leave out. Exact matches first: near ones are then looked for among the rest."""
    _records.cache_clear()
    documents_of.cache_clear()
    _verdicts.forget()
    _last_shingles.clear()
    total = sum(len(load_documents(store.folder, unit)) for unit in store.units)
    ranges = -(-max(total, 1) // DOCUMENTS_PER_BUCKET)
    edges: dict[str, Array] = {}
    settled = np.empty(0, np.uint64)
    for family in ("id", "exact", "near"):
        buckets = [
            Bucket(kind, row, (1 << 64) * i // ranges, (1 << 64) * (i + 1) // ranges)
            for row, kind in enumerate(key_kinds(dedup))
            if kind.startswith(family)
            for i in range(ranges)
        ]
        if buckets:
            edges[family] = _forest(run_units(partial(_edges, store, dedup, settled), buckets, workers))
            settled = np.union1d(settled, edges[family][:, 0])
    return _cluster(edges)


def _forest(found: Iterable[Array]) -> Array:
    """Edges from each document to the first one of its cluster, by all edges found.

    A pair of near-duplicates is found in most bands. What waits is joined when it outweighs what is joined already, so
    memory grows with the documents that have a duplicate and not with their pairs, and the work by its logarithm only.
    """
    forest, waiting, waiting_edges = np.empty((0, 2), np.uint64), list[Array](), 0
    for pairs in found:
        waiting.append(pairs)
        waiting_edges += len(pairs)
        if waiting_edges >= max(len(forest), EDGES_JOINED):
            forest, waiting, waiting_edges = _joined([forest, *waiting]), [], 0
    return _joined([forest, *waiting])


def _joined(edges: Sequence[Array]) -> Array:
    pairs = np.concatenate(edges)
    nodes = sorted_unique(pairs.ravel())
    first = smallest_members(len(nodes), np.searchsorted(nodes, pairs))
    later = np.flatnonzero(first != np.arange(len(nodes)))
    return np.stack((nodes[later], nodes[first[later]]), axis=1)


def _edges(store: DocumentStore, dedup: Dedup, settled: Array, bucket: Bucket) -> Array:
    """u64[pairs, 2]: (later document, earlier document) for verified equal keys of one bucket."""
    keys, documents = _read_bucket(store, bucket)
    if len(settled):
        open_ones = ~np.isin(documents, settled)
        keys, documents = keys[open_ones], documents[open_ones]
    pairs = array("Q")  # flat: as Python's pairs they would take ten times the memory
    for group in _groups(keys, documents):
        for pair in _pairs_of_group(store, dedup, bucket.kind, group):
            pairs.extend(pair)
    return np.array(pairs, np.uint64).reshape(-1, 2)


def _read_bucket(store: DocumentStore, bucket: Bucket) -> tuple[Array, Array]:
    keys, documents = [], []
    for index, name in enumerate(store.units):
        records = _records(store.folder, name)
        row = records.keys[bucket.row]
        first = int(np.searchsorted(row, np.uint64(bucket.low)))
        last = len(row) if bucket.high >= 1 << 64 else int(np.searchsorted(row, np.uint64(bucket.high)))
        keys.append(row[first:last])
        documents.append(records.order[bucket.row, first:last].astype(np.uint64) | np.uint64(index) << _UNIT_SHIFT)
    return np.concatenate(keys), np.concatenate(documents)


def _groups(keys: Array, documents: Array) -> Iterator[list[int]]:
    """Documents of equal keys in input order, groups of two or more."""
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    if not len(keys):
        return
    begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    ends = np.append(begins[1:], len(keys))
    several = (ends - begins > 1) & (keys[begins] != np.uint64(NO_KEY))
    for begin, end in zip(begins[several].tolist(), ends[several].tolist(), strict=True):
        yield documents[begin:end].tolist()


def _pairs_of_group(store: DocumentStore, dedup: Dedup, kind: str, group: list[int]) -> list[tuple[int, int]]:
    """Join each document to the first one before it that it equals, among a few unlike leaders."""
    leaders: list[int] = []
    pairs = []
    for document in group:
        match = next((leader for leader in leaders if _same(store, dedup, kind, document, leader)), None)
        if match is not None:
            pairs.append((document, match))
        elif len(leaders) < LEADERS_PER_GROUP:
            leaders.append(document)
    return pairs


def _same(store: DocumentStore, dedup: Dedup, kind: str, a: int, b: int) -> bool:
    if kind == "id":
        return True
    if kind == "exact":
        return bool(_document(store, a)["check"] == _document(store, b)["check"])
    assert dedup.near is not None
    return _is_similar(store, a, b, dedup.near.similarity)


def _document(store: DocumentStore, document: int) -> Array:
    row: Array = documents_of(store.folder, store.units[document >> 32])[document & 0xFFFFFFFF]
    return row


@lru_cache(maxsize=64)  # every mapped file holds a descriptor
def _records(folder: Path, unit: str) -> UnitRecords:
    return load_records(folder, unit)


@lru_cache(maxsize=256)  # pairs are met in no order of units, so a miss must cost little: it maps one file
def documents_of(folder: Path, unit: str) -> Array:
    """The rows of `DOCUMENT` of a unit."""
    return load_documents(folder, unit)


class _Verdicts:
    """Verdicts on pairs of documents, each in the one place that its hash names; a later pair takes the place.

    A pair meets again in most of its bands. A dictionary of pairs would take ten times the memory, and whenever it was
    full and cleared every pair would be judged again in every band.
    """

    def __init__(self) -> None:
        self._pairs = array("Q")  # later document, earlier document with the verdict in its highest bit; 0, 0: none

    def forget(self) -> None:
        self._pairs = array("Q", bytes(16 * VERDICTS_KEPT))

    def place(self, a: int, b: int) -> int:
        return 2 * (((a * _MIX_A + b * _MIX_B & _U64) >> 32) % VERDICTS_KEPT)

    def get(self, place: int, a: int, b: int) -> bool | None:
        first, second = self._pairs[place], self._pairs[place + 1]
        return bool(second & _VERDICT) if first == a and second & ~_VERDICT == b else None

    def put(self, place: int, a: int, b: int, verdict: bool) -> None:
        self._pairs[place], self._pairs[place + 1] = a, b | _VERDICT * verdict


_U64, _VERDICT = (1 << 64) - 1, 1 << 63
_MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_verdicts = _Verdicts()
_last_shingles: dict[int, Array] = {}


def _is_similar(store: DocumentStore, a: int, b: int, similarity: float) -> bool:
    """Whether two documents are near-duplicates; a pair meets again in other bands, so the verdict is remembered."""
    place = _verdicts.place(a, b)
    verdict = _verdicts.get(place, a, b)
    if verdict is None:
        verdict = jaccard(_shingles(store, a), _shingles(store, b)) >= similarity
        _verdicts.put(place, a, b, verdict)
    return verdict


def _shingles(store: DocumentStore, document: int) -> Array:
    """The shingles of a document; those met last are kept, because a leader is compared with many."""
    if document not in _last_shingles:
        if len(_last_shingles) >= SHINGLE_SETS_KEPT:
            _last_shingles.clear()
        tokens = store.token_readers[document >> 32].tokens(document & 0xFFFFFFFF)
        _last_shingles[document] = shingle_set(tokens)
    return _last_shingles[document]


def _cluster(edges: dict[str, Array]) -> Duplicates:
    """Join edges to clusters; everything but the first of a cluster is dropped, for the first kind that found it."""
    nodes = sorted_unique(np.concatenate([pairs.ravel() for pairs in edges.values()]) if edges else np.empty(0, "u8"))
    found_by = np.zeros(len(nodes), np.uint8)
    ends = {kind: np.searchsorted(nodes, pairs) for kind, pairs in edges.items()}
    for number, kind in reversed(list(enumerate(ends))):
        found_by[ends[kind].ravel()] = number
    first = smallest_members(len(nodes), np.concatenate(list(ends.values())) if ends else np.empty((0, 2), np.int64))
    dropped = np.flatnonzero(first != np.arange(len(nodes)))
    return Duplicates(nodes[dropped], nodes[first[dropped]], found_by[dropped], tuple(edges))


def smallest_members(count: int, pairs: Array) -> Array:
    """For each of `count` nodes the smallest one it is connected to: labels spread over edges and along themselves."""
    label = np.arange(count)
    while len(pairs):
        low = np.minimum(label[pairs[:, 0]], label[pairs[:, 1]])
        before = label.copy()
        for end in (0, 1):
            np.minimum.at(label, label[pairs[:, end]], low)  # the root of either end learns of the other
            np.minimum.at(label, pairs[:, end], low)
        while not np.array_equal(label, above := label[label]):
            label = above
        if np.array_equal(label, before):
            break
    return label
