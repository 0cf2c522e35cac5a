"""A little of the input, read before a run starts: for the tokenizer's self-check, and to find unreadable sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.readers.unreadable import bad_input, unreadable_error
from megatron_cpt.corpus.schema import Corpus

# Of every source so many documents are read before the start.
PROBE_DOCUMENTS = 100
# A source of which more than this ratio cannot be read stops the run early, whatever the size of the others.
EARLY_BAD_RATIO = 0.5
# Fewer documents than this say nothing, unless none of them can be read.
MIN_PROBED_DOCUMENTS = 20
_EXAMPLES_SHOWN = 3


def probe_sources(corpus: Corpus, units: Sequence[Unit]) -> None:
    """Raise DataError when the first documents of a source are mostly unreadable.

    A wrong key in one source of many should not be found after hours, or be lost among the readable ones.
    """
    max_ratio = max(EARLY_BAD_RATIO, corpus.max_reject_ratio)
    first_units: dict[str, list[Unit]] = {}
    for unit in units:
        first_units.setdefault(unit.source, []).append(unit)
    for name, own in first_units.items():
        tally = _probe(own, corpus.max_document_bytes)
        bad = sum(bad_input(tally.counts).values())
        is_enough = tally.documents_read >= MIN_PROBED_DOCUMENTS or bad == tally.documents_read
        if bad > max_ratio * tally.documents_read and is_enough:
            examples = [f"{r.path}:{r.place}: {r.reason}: {r.detail}" for r in tally.rejects[:_EXAMPLES_SHOWN]]
            what = f" at the start of source {name!r}"
            raise unreadable_error(what, tally.counts, tally.documents_read, max_ratio, examples)


def _probe(units: Sequence[Unit], max_document_bytes: int) -> UnitTally:
    """The tally of the first documents of some units."""
    read = UnitTally()
    for unit in units:
        own = UnitTally()
        for _ in read_unit(unit, own, max_document_bytes):
            if read.documents_read + own.documents_read >= PROBE_DOCUMENTS:
                break
        read.documents_read += own.documents_read
        read.counts += own.counts
        read.rejects += own.rejects
        if read.documents_read >= PROBE_DOCUMENTS:
            break
    return read


def sample_texts(units: Sequence[Unit], max_document_bytes: int, chars_per_unit: int = 1 << 14) -> list[str]:
    """Texts from four places of the corpus, for the tokenizer's self-check."""
    texts: list[str] = []
    for unit in units[:: max(1, len(units) // 4)][:4]:
        wanted_chars = chars_per_unit
        for text in _texts(read_unit(unit, UnitTally(), max_document_bytes)):
            texts.append(text[:wanted_chars])
            wanted_chars -= len(text)
            if wanted_chars <= 0:
                break
    return texts


def _texts(batches: Iterator[Batch]) -> Iterator[str]:
    return (text for batch in batches for text in batch.texts)
