"""Finished datasets joined without their duplicates. No tokenizer is needed.

Documents are compared by token ids, so as training would see them; `preprocess` compares text, which also finds
duplicates that differ in case or white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.indexed import IndexedReader
from megatron_cpt.corpus.dataset.manifest import Manifest
from megatron_cpt.corpus.dataset.merge import check_same_tokenizer
from megatron_cpt.corpus.dataset.select import ChosenDocuments, write_chosen
from megatron_cpt.corpus.dataset.soundness import open_proven
from megatron_cpt.corpus.dataset.writer import refuse_existing
from megatron_cpt.corpus.dedup.duplicates import DocumentStore, find_duplicates
from megatron_cpt.corpus.dedup.records import RecordWriter
from megatron_cpt.corpus.documents import Batch, Encoded
from megatron_cpt.corpus.schema_processing import Dedup
from megatron_cpt.corpus.staging import staging_folder, write_errors_told
from megatron_cpt.corpus.workers import run_units, worker_count

DOCUMENTS_PER_RANGE = 4096


@dataclass(frozen=True)
class DocumentRange:
    """Neighbouring documents of a dataset, whose records are made together."""

    name: str  # of the record files
    reader: IndexedReader
    first: int
    last: int  # one past the last

    def tokens(self, document: int) -> Array:
        """Ids of a document, counted from the start of the range."""
        return self.reader.document(self.first + document)

    def documents(self) -> list[Array]:
        return [np.asarray(self.reader.document(index)) for index in range(self.first, self.last)]


def ranges_of(reader: IndexedReader, name_format: str) -> list[DocumentRange]:
    """All documents of a dataset in ranges; `name_format` is filled with the first document's number."""
    return [
        DocumentRange(name_format.format(first), reader, first, min(first + DOCUMENTS_PER_RANGE, reader.document_count))
        for first in range(0, reader.document_count, DOCUMENTS_PER_RANGE)
    ]


def encoded_documents(documents: Sequence[Array]) -> Encoded:
    """Documents of one sequence each, or of none when they have no tokens."""
    lengths = np.array([len(ids) for ids in documents])
    return Encoded(np.concatenate(documents), lengths[lengths > 0], (lengths > 0).astype(np.int64))


def dedup_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    dedup: Dedup,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Join datasets of one tokenizer without their duplicates; the first document in the order given stays.

    Raises DataError when one is damaged or they do not fit together.
    """
    manifests, readers = open_proven(prefixes)
    check_same_tokenizer(prefixes, manifests)
    refuse_existing(output_prefix, overwrite)
    by_dataset = [ranges_of(reader, f"u{index:03d}-{{:09d}}") for index, reader in enumerate(readers)]
    ranges = [part for own in by_dataset for part in own]
    owners = [index for index, own in enumerate(by_dataset) for _ in own]
    with write_errors_told(output_prefix), staging_folder(f"{output_prefix}.records", "dedup") as folder:
        list(run_units(partial(_write_records, folder, dedup), ranges, worker_count(workers)))
        store = DocumentStore(folder, [part.name for part in ranges], ranges)
        found = find_duplicates(store, dedup, worker_count(workers))
    masks = [np.ones(reader.document_count, bool) for reader in readers]
    for node in found.dropped.tolist():
        masks[owners[node >> 32]][ranges[node >> 32].first + (node & 0xFFFFFFFF)] = False
    chosen = [ChosenDocuments(*one) for one in zip(readers, manifests, masks, strict=True)]
    counts = {f"duplicate_{kind}": count for kind, count in found.counts().items() if count}
    return write_chosen(output_prefix, chosen, counts)


def _write_records(folder: Path, dedup: Dedup, part: DocumentRange) -> None:
    """Records of some documents. The exact key hashes the token ids."""
    documents = part.documents()
    batch = Batch("", [ids.tobytes().hex() for ids in documents], list(range(part.first + 1, part.last + 1)))
    writer = RecordWriter(dedup)
    writer.add(batch, encoded_documents(documents), np.zeros(len(documents), np.uint8), 0)
    writer.save(folder, part.name)
