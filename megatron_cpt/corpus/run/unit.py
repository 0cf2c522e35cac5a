"""One unit from raw bytes to a part: read, step by step, tokenise, split, write.

Where passages are deduplicated this is done in two halves, `clean_unit` and `process_unit`: see dedup.passage_stage.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_cpt.corpus.dataset.split import split_of
from megatron_cpt.corpus.dedup.passage_stage import (
    CleanedWriter,
    documents_without_repeats,
    forget_cleaned,
    is_cleaned,
    read_cleaned_tally,
)
from megatron_cpt.corpus.dedup.records import RecordWriter
from megatron_cpt.corpus.documents import Batch, DocumentCounts, UnitTally
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.readers.streams import forget_piece
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.run.corpus_run import CorpusRun
from megatron_cpt.corpus.run.encode import encode_documents
from megatron_cpt.corpus.run.parts import (
    PartWriter,
    UnitRecord,
    commit_unit,
    parts_are_whole,
    read_record,
    write_rejects,
)


def process_unit(run: CorpusRun, unit: Unit) -> UnitRecord:
    """Read, clean, tokenise and commit one unit. Return its record."""
    tally = read_cleaned_tally(run.staging, unit.name) if run.passages else UnitTally()
    if run.passages:
        batches = documents_without_repeats(run.staging, unit.name, run.passages, tally)
    else:
        batches = _cleaned_documents(run, unit, tally)
    writer = _UnitWriter(run, unit)
    for batch in batches:
        if batch.texts:
            writer.add(batch, tally)
    record = _record_of(unit, tally, writer.close())
    commit_unit(run.staging, record, tally)
    forget_piece(unit)
    if run.passages:
        forget_cleaned(run.staging, unit.name)
    return record


def processed_record(run: CorpusRun, unit: Unit) -> UnitRecord | None:
    """The record of a unit whose parts are there in full."""
    record = read_record(run.staging, unit.name)
    return record if record is not None and parts_are_whole(run.staging, record, run.tokenizer.dtype) else None


def clean_unit(run: CorpusRun, unit: Unit) -> UnitRecord:
    """Read and clean one unit, and leave its documents and passages. Return its record so far."""
    assert run.passages is not None
    tally, writer = UnitTally(), CleanedWriter(run.staging, unit.name, run.passages)
    for batch in _cleaned_documents(run, unit, tally):
        writer.add(batch)
    record = _record_of(unit, tally, {})
    write_rejects(run.staging, record, tally)
    writer.commit(tally)
    forget_piece(unit)
    return record


def cleaned_record(run: CorpusRun, unit: Unit) -> UnitRecord | None:
    """The record of a unit that need not be cleaned again."""
    if not is_cleaned(run.staging, unit.name, processed_record(run, unit) is not None):
        return None
    return _record_of(unit, read_cleaned_tally(run.staging, unit.name), {})


def _cleaned_documents(run: CorpusRun, unit: Unit, tally: UnitTally) -> Iterator[Batch]:
    for batch in read_unit(unit, tally, run.corpus.max_document_bytes):
        for step in run.steps[unit.source]:
            batch = step(batch, tally)
        yield batch


def _record_of(unit: Unit, tally: UnitTally, parts: dict[str, DocumentCounts]) -> UnitRecord:
    return UnitRecord(
        unit=unit.name,
        source=unit.source,
        size_bytes=unit.size_bytes,
        documents_read=tally.documents_read,
        lines_read=tally.lines_read,
        parts=parts,
        reject_counts=dict(tally.counts),
        languages=dict(tally.languages),
        metadata_found=dict(tally.metadata_found),
        notes=dict(tally.notes),
        passages_removed=tally.passages_removed,
        passage_chars_removed=tally.passage_chars_removed,
        passage_examples=tally.passage_examples,
    )


class _UnitWriter:
    """The parts of a unit, one per split, and its records where duplicates are looked for."""

    def __init__(self, run: CorpusRun, unit: Unit) -> None:
        self._run, self._unit = run, unit
        self._parts = {
            split: PartWriter(run.staging, unit.name, split, run.tokenizer.dtype, run.lists_documents)
            for split in run.splits
        }
        dedup = run.corpus.dedup
        self._records = RecordWriter(dedup) if dedup and dedup.compares_documents else None
        self._path_index = {path: index for index, path in enumerate(unit.paths)}

    def add(self, batch: Batch, tally: UnitTally) -> None:
        """Tokenise a batch, cut and end its documents, and give each split its documents."""
        batch, encoded = encode_documents(self._run, batch, tally)
        if not batch.texts:
            return
        fractions = self._run.corpus.split
        owner = np.array(split_of(batch.texts, fractions) if fractions else [0] * len(batch))
        if self._records is not None:
            self._records.add(batch, encoded, owner, self._path_index[batch.path])
        if len(self._parts) == 1:
            next(iter(self._parts.values())).write(encoded, batch)
            return
        for index, part in enumerate(self._parts.values()):
            mine = owner == index
            part.write(encoded.select(mine), batch.keep(mine.tolist()))

    def close(self) -> dict[str, DocumentCounts]:
        """Put everything on the disk under its final name. Return what each part holds."""
        counts = {split: part.close() for split, part in self._parts.items()}
        if self._records is not None:
            self._records.save(self._run.staging, self._unit.name)
        return counts
