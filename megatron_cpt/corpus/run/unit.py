"""One unit from raw bytes to a part: read, step by step, tokenise, split, write.

Where passages are deduplicated this is done in two halves, `clean_unit` and `process_unit`: see passage_stage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.dataset.split import split_of
from megatron_cpt.corpus.dedup.passage_stage import (
    CleanedWriter,
    documents_without_repeats,
    forget_cleaned,
    read_cleaned_ledger,
)
from megatron_cpt.corpus.dedup.records import RecordWriter
from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.filters.chunking import chunk_texts, chunk_tokens
from megatron_cpt.corpus.filters.decontamination import Decontaminator
from megatron_cpt.corpus.filters.steps import Step, build_steps
from megatron_cpt.corpus.readers.blocks import forget_block
from megatron_cpt.corpus.readers.lines import read_unit
from megatron_cpt.corpus.readers.units import Unit
from megatron_cpt.corpus.run.parts import Array, Encoded, PartCounts, PartWriter, UnitRecord, commit_unit, write_rejects
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.schema_processing import Passages
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer, Ids, Lengths

WHOLE = "all"  # the name of the only part of a unit when the corpus is not split


@dataclass(frozen=True)
class Job:
    """What every worker needs; made once, inherited by fork."""

    corpus: Corpus
    tokenizer: CorpusTokenizer
    staging: Path
    steps: dict[str, list[Step]]  # by source

    @property
    def splits(self) -> list[str]:
        return list(self.corpus.split) or [WHOLE]

    @property
    def passages(self) -> Passages | None:
        return self.corpus.dedup.passages if self.corpus.dedup else None


def steps_by_source(corpus: Corpus) -> dict[str, list[Step]]:
    """Cleaning and filters of each source (its own, else the corpus's), then decontamination."""
    last: list[Step] = [Decontaminator(corpus.decontaminate, corpus)] if corpus.decontaminate else []
    steps: dict[str, list[Step]] = {}
    for source in corpus.sources:
        clean, filters = source.clean or corpus.clean, source.filters or corpus.filters
        steps[source.name] = build_steps(clean, filters, corpus.keep_empty_documents) + last
    return steps


def process_unit(job: Job, unit: Unit) -> UnitRecord:
    """Read, clean, tokenise and commit one unit; returns its record."""
    ledger = read_cleaned_ledger(job.staging, unit.index) if job.passages else Ledger()
    writers = {
        split: PartWriter(job.staging, unit.index, split, job.tokenizer.dtype, bool(unit.metadata))
        for split in job.splits
    }
    dedup = job.corpus.dedup
    duplicates = RecordWriter(dedup) if dedup and dedup.compares_documents else None
    if job.passages:
        batches = documents_without_repeats(job.staging, unit.index, job.passages, ledger)
    else:
        batches = _cleaned_documents(job, unit, ledger)
    for batch in batches:
        if batch.texts:
            _encode(job, unit, batch, ledger, writers, duplicates)
    record = unit_record(unit, ledger, {split: writer.close() for split, writer in writers.items()})
    if duplicates is not None:
        duplicates.save(job.staging, f"{unit.index:06d}")
    commit_unit(job.staging, record, ledger)
    forget_block(unit)
    if job.passages:
        forget_cleaned(job.staging, unit.index)
    return record


def clean_unit(job: Job, unit: Unit) -> UnitRecord:
    """Read and clean one unit, and leave its documents and passages; returns its record so far."""
    assert job.passages is not None
    ledger, writer = Ledger(), CleanedWriter(job.staging, unit.index, job.passages)
    for batch in _cleaned_documents(job, unit, ledger):
        writer.add(batch)
    record = unit_record(unit, ledger, {})
    write_rejects(job.staging, record, ledger)
    writer.commit(ledger)
    forget_block(unit)
    return record


def _cleaned_documents(job: Job, unit: Unit, ledger: Ledger) -> Iterator[Batch]:
    for batch in read_unit(unit, ledger, job.corpus.max_document_bytes):
        for step in job.steps[unit.source]:
            batch = step(batch, ledger)
        yield batch


def unit_record(unit: Unit, ledger: Ledger, parts: dict[str, PartCounts]) -> UnitRecord:
    """The record of a unit from its account."""
    return UnitRecord(
        unit=unit.index,
        source=unit.source,
        size_bytes=unit.size_bytes,
        documents_read=ledger.documents_read,
        lines_read=ledger.lines_read,
        parts=parts,
        reject_counts=dict(ledger.counts),
        languages=dict(ledger.languages),
        passages_removed=ledger.passages_removed,
        passage_chars_removed=ledger.passage_chars_removed,
        passage_examples=ledger.passage_examples,
    )


def _encode(
    job: Job,
    unit: Unit,
    batch: Batch,
    ledger: Ledger,
    writers: dict[str, PartWriter],
    duplicates: RecordWriter | None,
) -> None:
    """Tokenise a batch, cut and end its documents, and give each split its documents."""
    batch, encoded = encode_documents(job, batch, ledger)
    if not batch.texts:
        return
    split = split_of(batch.texts, job.corpus.split) if job.corpus.split else [0] * len(batch)
    owner = np.array(split)
    if duplicates is not None:
        duplicates.add(batch, encoded, owner, unit.paths.index(batch.path))
    if len(writers) == 1:
        next(iter(writers.values())).write(encoded, batch)
        return
    for index, writer in enumerate(writers.values()):
        mine = owner == index
        writer.write(encoded.select(mine), batch.keep(mine.tolist()))


def encode_documents(job: Job, batch: Batch, ledger: Ledger) -> tuple[Batch, Encoded]:
    """Token ids of a batch by the corpus's chunking, EOD and special-token rules."""
    tokenizer, chunking = job.tokenizer, job.corpus.chunking
    pieces, per_document = batch.texts, np.ones(len(batch), np.int64)
    if chunking.mode in ("characters", "sentences"):
        pieces, per_document = chunk_texts(batch.texts, chunking.mode, chunking.size, chunking.overlap)
    ids, lengths = tokenizer.encode_batch(pieces)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise AssertionError(f"{tokenizer.backend} gave an id outside 0..{tokenizer.vocab_size - 1}")
    if job.corpus.append_eod:
        ids, lengths = append_eod(ids, lengths, per_document, tokenizer.eod_id)
    if chunking.mode == "tokens":
        ids, lengths, per_document = chunk_tokens(ids, lengths, chunking.size, chunking.overlap)
    filled = lengths > 0  # a document without tokens has no sequence (Megatron's convention)
    if not filled.all():
        owner = np.repeat(np.arange(len(batch)), per_document)
        per_document = np.bincount(owner[filled], minlength=len(batch))
        lengths = lengths[filled]
    encoded = Encoded(ids, lengths, per_document)
    if job.corpus.special_tokens_in_text == "reject" and tokenizer.special_ids:
        return _reject_special(job, batch, ledger, encoded)
    return batch, encoded


def append_eod(ids: Ids, lengths: Lengths, per_document: Array, eod_id: int) -> tuple[Ids, Lengths]:
    """End every document that has tokens with `eod_id`, on its last piece, in one pass over the flat ids."""
    last = np.cumsum(per_document) - 1
    tokens = np.concatenate(([0], np.cumsum(lengths)))
    filled = tokens[last + 1] > tokens[last + 1 - per_document]
    longer = lengths.copy()
    longer[last[filled]] += 1
    ends = (np.cumsum(longer) - 1)[last[filled]]
    out = np.empty(int(longer.sum()), np.int32)
    is_text = np.ones(len(out), bool)
    is_text[ends] = False
    out[is_text] = ids
    out[ends] = eod_id
    return out, longer


def _reject_special(job: Job, batch: Batch, ledger: Ledger, encoded: Encoded) -> tuple[Batch, Encoded]:
    """Reject documents in which a special token is spelled out (the EOD that ends them does not count)."""
    special = np.isin(encoded.ids, np.array(sorted(job.tokenizer.special_ids), np.int32))
    document_tokens = encoded.document_tokens()
    found = np.bincount(np.repeat(np.arange(len(batch)), document_tokens)[special], minlength=len(batch))
    allowed = (document_tokens > 0) & job.corpus.append_eod & (job.tokenizer.eod_id in job.tokenizer.special_ids)
    wanted = found <= allowed
    if wanted.all():
        return batch, encoded
    return ledger.reject_where(batch, wanted.tolist(), "special_token_in_text"), encoded.select(wanted)


def sample_texts(units: Sequence[Unit], max_document_bytes: int, chars_per_unit: int = 1 << 14) -> list[str]:
    """Texts from four places of the corpus, for the tokenizer's self-check."""
    texts: list[str] = []
    for unit in units[:: max(1, len(units) // 4)][:4]:
        wanted_chars = chars_per_unit
        for batch in read_unit(unit, Ledger(), max_document_bytes):
            for text in batch.texts:
                if wanted_chars > 0:
                    texts.append(text[:wanted_chars])
                    wanted_chars -= len(text)
            if wanted_chars <= 0:
                break
    return texts


def worker_count(requested: int | None) -> int:
    """Workers asked for, or the processor cores this process may use."""
    return requested or len(os.sched_getaffinity(0))
