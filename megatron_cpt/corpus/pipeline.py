"""One unit from raw bytes to a part: read, step by step, tokenise, split, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.parts import PartWriter, UnitRecord, commit_unit
from megatron_cpt.corpus.readers import read_unit
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.sources import Unit
from megatron_cpt.corpus.split import split_of
from megatron_cpt.corpus.tokenizer import CorpusTokenizer, Ids, Lengths

Step = Callable[[Batch, Ledger], Batch]
WHOLE = "all"  # the name of the only part of a unit when the corpus is not split


@dataclass(frozen=True)
class Job:
    """What every worker needs; made once, inherited by fork."""

    corpus: Corpus
    tokenizer: CorpusTokenizer
    staging: Path

    @property
    def splits(self) -> list[str]:
        return list(self.corpus.split) or [WHOLE]


def process_unit(job: Job, unit: Unit) -> UnitRecord:
    """Read, clean, tokenise and commit one unit; returns its record."""
    ledger = Ledger()
    steps = [drop_empty] if not job.corpus.keep_empty_documents else []
    writers = {s: PartWriter(job.staging, unit.index, s, job.tokenizer.dtype) for s in job.splits}
    for batch in read_unit(unit, ledger, job.corpus.max_document_bytes):
        for step in steps:
            batch = step(batch, ledger)
        if batch.texts:
            _encode(job, batch, ledger, writers)
    record = UnitRecord(
        unit=unit.index,
        source=unit.source,
        size_bytes=unit.size_bytes,
        documents_read=ledger.documents_read,
        lines_read=ledger.lines_read,
        parts={split: writer.close() for split, writer in writers.items()},
        reject_counts=dict(ledger.counts),
    )
    commit_unit(job.staging, record, ledger)
    return record


def drop_empty(batch: Batch, ledger: Ledger) -> Batch:
    """Reject documents of nothing but white space."""
    wanted = [bool(text) and not text.isspace() for text in batch.texts]
    return batch if all(wanted) else ledger.reject_where(batch, wanted, "empty")


def _encode(job: Job, batch: Batch, ledger: Ledger, writers: dict[str, PartWriter]) -> None:
    """Tokenise a batch, end its documents, and give each split its documents."""
    tokenizer = job.tokenizer
    ids, lengths = tokenizer.encode_batch(batch.texts)
    if job.corpus.special_tokens_in_text == "reject" and tokenizer.special_ids:
        batch, ids, lengths = _reject_special(tokenizer, batch, ledger, ids, lengths)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise AssertionError(f"{tokenizer.backend} gave an id outside 0..{tokenizer.vocab_size - 1}")
    if job.corpus.append_eod:
        ids, lengths = append_eod(ids, lengths, tokenizer.eod_id)
    if len(writers) == 1:
        _write(next(iter(writers.values())), ids, lengths)
        return
    owner = np.array(split_of(batch.texts, job.corpus.split))
    for index, writer in enumerate(writers.values()):
        mine = owner == index
        _write(writer, ids[np.repeat(mine, lengths)], lengths[mine])


def _write(writer: PartWriter, ids: Ids, lengths: Lengths) -> None:
    """One sequence per document; a document without tokens has none (Megatron's convention)."""
    filled = lengths > 0
    writer.write(ids, lengths[filled], filled)


def append_eod(ids: Ids, lengths: Lengths, eod_id: int) -> tuple[Ids, Lengths]:
    """End every document that has tokens with `eod_id`, in one pass over the flat ids."""
    filled = lengths > 0
    longer = lengths + filled
    ends = (np.cumsum(longer) - 1)[filled]
    out = np.empty(int(longer.sum()), np.int32)
    is_text = np.ones(len(out), bool)
    is_text[ends] = False
    out[is_text] = ids
    out[ends] = eod_id
    return out, longer


def _reject_special(
    tokenizer: CorpusTokenizer, batch: Batch, ledger: Ledger, ids: Ids, lengths: Lengths
) -> tuple[Batch, Ids, Lengths]:
    """Reject documents in which a special token is spelled out."""
    special = np.isin(ids, np.array(sorted(tokenizer.special_ids), np.int32))
    if not special.any():
        return batch, ids, lengths
    document_of_token = np.repeat(np.arange(len(lengths)), lengths)
    wanted = np.ones(len(lengths), bool)
    wanted[document_of_token[special]] = False
    kept = ledger.reject_where(batch, wanted.tolist(), "special_token_in_text")
    return kept, ids[np.repeat(wanted, lengths)], lengths[wanted]


def sample_texts(units: Sequence[Unit], max_document_bytes: int, wanted_chars: int = 1 << 18) -> list[str]:
    """The first texts of the corpus, for the tokenizer's self-check."""
    texts: list[str] = []
    for unit in units[:4]:
        for batch in read_unit(unit, Ledger(), max_document_bytes):
            for text in batch.texts:
                if wanted_chars <= 0:
                    return texts
                texts.append(text[:wanted_chars])
                wanted_chars -= len(text)
    return texts


def worker_count(requested: int | None) -> int:
    """Workers asked for, or the processor cores this process may use."""
    return requested or len(os.sched_getaffinity(0))
