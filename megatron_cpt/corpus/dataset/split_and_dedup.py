"""Finished datasets taken apart and thinned: split by document, duplicates removed. No tokenizer is needed.

Both go by token ids, so they see what training would see; `preprocess` does the same on text, which also finds
duplicates that differ in case or white space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from megatron_cpt import __version__
from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord, manifest_path, read_manifest
from megatron_cpt.corpus.dataset.merge import check_same_tokenizer
from megatron_cpt.corpus.dataset.split import split_of_hashes
from megatron_cpt.corpus.dataset.writer import write_files
from megatron_cpt.corpus.dedup.duplicates import DocumentStore, find_duplicates
from megatron_cpt.corpus.dedup.records import RecordWriter
from megatron_cpt.corpus.documents import Batch
from megatron_cpt.corpus.run.parts import Array, Encoded
from megatron_cpt.corpus.run.staging import staging_folder
from megatron_cpt.corpus.run.unit import worker_count
from megatron_cpt.corpus.run.workers import run_units
from megatron_cpt.corpus.schema_processing import Dedup
from megatron_cpt.errors import DataError

DOCUMENTS_PER_UNIT = 4096
Selection = tuple[IndexedReader, Array]  # a dataset and a mask of its documents


@dataclass(frozen=True)
class _Column:
    """One array over all selections, re-iterable; tokens come run by run, as views."""

    selections: Sequence[Selection]
    name: str

    def __iter__(self) -> Iterator[Array]:
        for reader, wanted in self.selections:
            sequences = np.diff(reader.document_indices)
            if self.name == "sequences":
                yield sequences[wanted]
            elif self.name == "lengths":
                yield reader.sequence_lengths[np.repeat(wanted, sequences)]
            else:
                yield from _token_runs(reader, wanted)


def _token_runs(reader: IndexedReader, wanted: Array) -> Iterator[Array]:
    ends = np.concatenate(([0], np.cumsum(reader.sequence_lengths, dtype=np.int64)))[
        np.asarray(reader.document_indices)
    ]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], wanted.astype(np.int8), [0]))))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield reader.tokens[ends[begin] : ends[end]]


def _document_tokens(reader: IndexedReader) -> Array:
    ends = np.concatenate(([0], np.cumsum(reader.sequence_lengths, dtype=np.int64)))
    return np.diff(ends[np.asarray(reader.document_indices)])


def split_dataset(prefix: str, fractions: Mapping[str, float], *, overwrite: bool = False) -> dict[str, Manifest]:
    """Write PREFIX_NAME for each name, documents chosen by a hash of their ids; PREFIX stays."""
    manifest, reader = read_manifest(prefix), open_indexed(prefix)
    hashes = [xxhash.xxh3_64_intdigest(ids.tobytes(), seed=1) for ids in reader]
    owner = np.array(split_of_hashes(hashes, fractions))
    for name in fractions:
        _refuse_existing(f"{prefix}_{name}", overwrite)
        if not (owner == list(fractions).index(name)).any():
            raise DataError(f"split {name!r} gets no document", hint="give it a larger fraction")
    return {
        f"{prefix}_{name}": _write(f"{prefix}_{name}", [(reader, owner == index)], [manifest], {})
        for index, name in enumerate(fractions)
    }


def dedup_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    dedup: Dedup,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Join datasets of one tokenizer without their duplicates; the first document in the order given stays."""
    manifests = [read_manifest(prefix) for prefix in prefixes]
    check_same_tokenizer(prefixes, manifests)
    _refuse_existing(output_prefix, overwrite)
    readers = [open_indexed(prefix) for prefix in prefixes]
    units = [
        (f"u{dataset:03d}-{first:09d}", dataset, first, min(first + DOCUMENTS_PER_UNIT, reader.document_count))
        for dataset, reader in enumerate(readers)
        for first in range(0, reader.document_count, DOCUMENTS_PER_UNIT)
    ]
    with staging_folder(f"{output_prefix}.records", "dedup") as folder:
        list(run_units(partial(_map_unit, folder, readers, dedup), units, worker_count(workers)))
        store = DocumentStore(folder, [unit[0] for unit in units], [_Tokens(readers[d], f) for _, d, f, _ in units])
        found = find_duplicates(store, dedup, worker_count(workers))
    masks = [np.ones(reader.document_count, bool) for reader in readers]
    for node in found.dropped.tolist():
        _, dataset, first, _ = units[node >> 32]
        masks[dataset][first + (node & 0xFFFFFFFF)] = False
    counts = {f"duplicate_{kind}": count for kind, count in found.counts().items() if count}
    return _write(output_prefix, list(zip(readers, masks, strict=True)), manifests, counts)


@dataclass(frozen=True)
class _Tokens:
    reader: IndexedReader
    first: int

    def tokens(self, document: int) -> Array:
        return self.reader.document(self.first + document)


def _map_unit(folder: Path, readers: Sequence[IndexedReader], dedup: Dedup, unit: tuple[str, int, int, int]) -> None:
    """Records of some documents; the exact key is of the ids, written as text."""
    name, dataset, first, last = unit
    documents = [np.asarray(readers[dataset].document(i)) for i in range(first, last)]
    lengths = np.array([len(ids) for ids in documents])
    encoded = Encoded(np.concatenate(documents), lengths[lengths > 0], (lengths > 0).astype(np.int64))
    batch = Batch("", [ids.tobytes().hex() for ids in documents], list(range(first + 1, last + 1)))
    writer = RecordWriter(dedup)
    writer.add(batch, encoded, np.zeros(len(documents), np.uint8), 0)
    writer.save(folder, name)


def _refuse_existing(prefix: str, overwrite: bool) -> None:
    if manifest_path(prefix).exists() and not overwrite:
        raise DataError(f"{prefix}: there is already a dataset", hint="give --overwrite, or another prefix")


def _write(
    prefix: str, selections: Sequence[Selection], manifests: Sequence[Manifest], rejects: dict[str, int]
) -> Manifest:
    """The selected documents as a dataset. Shares per source are exact only for one source per dataset."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    tokens = [int(_document_tokens(reader)[wanted].sum()) for reader, wanted in selections]
    documents = [int(wanted.sum()) for _, wanted in selections]
    total = max(sum(tokens), 1)
    sources = [
        SourceRecord(Path(reader.prefix).name, 1, count, size, round(size / total, 6))
        for (reader, _), count, size in zip(selections, documents, tokens, strict=True)
    ]
    origins = [
        {"prefix": reader.prefix, "bin_sha256": manifest.bin_sha256}
        for (reader, _), manifest in zip(selections, manifests, strict=True)
    ]
    template = replace(
        manifests[0],
        tool_version=__version__,
        document_count=sum(documents),
        sequence_count=sum(int(np.diff(reader.document_indices)[wanted].sum()) for reader, wanted in selections),
        token_count=sum(tokens),
        input_bytes=sum(m.input_bytes for m in manifests),
        sources=tuple(sources),
        rejects=rejects,
        config={"from": origins},
    )
    with staging_folder(prefix, "rewrite") as staging:
        columns = (_Column(selections, name) for name in ("tokens", "lengths", "sequences"))
        return write_files(staging, "rewritten", prefix, template, *columns)
