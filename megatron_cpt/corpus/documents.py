"""What flows between the steps: batches of documents as text and as token ids, and a tally of rejected documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np

from megatron_cpt.corpus.arrays import Array

# Reasons that mean unreadable input rather than a choice of the user; `max_reject_ratio` counts only these.
BAD_INPUT_REASONS = frozenset(
    {
        "invalid_json", "invalid_utf8", "lone_surrogate", "not_an_object", "missing_key", "text_not_a_string",
        "document_too_long", "unreadable", "invalid_csv", "not_text",
    }
)  # fmt: skip
# A note on documents that were kept: JSON as Python writes it, with NaN, Infinity or a lone surrogate beside the text.
NONSTANDARD_JSON = "nonstandard_json"
# Notes on what the vocabulary cannot say: tokens of the kept documents that stand for it, and the documents with any.
UNKNOWN_TOKENS = "unknown_tokens"
WITH_UNKNOWN_TOKENS = "documents_with_unknown_tokens"
EXCERPT_CHARS = 200


def unknown_text(notes: Mapping[str, int]) -> str | None:
    """What the notes say of text that the vocabulary cannot say, None where it said all of it."""
    if not notes.get(UNKNOWN_TOKENS):
        return None
    return (
        f"text that the tokenizer cannot say, kept as its unknown token: {notes[UNKNOWN_TOKENS]:,} tokens in "
        f"{notes[WITH_UNKNOWN_TOKENS]:,} documents"
    )


@dataclass(slots=True)
class Batch:
    """Documents in input order.

    `places[i]` is the line (jsonl), row (parquet) or 1 (text file), from 1, in `path`; for a byte range it counts
    from the start of the unit.
    """

    path: str
    texts: list[str]
    places: list[int]
    metadata: list[dict[str, Any]] | None = None  # the kept keys of each document
    from_pages: bool = False  # the texts are those of HTML pages: what looks like a tag in them was written to be read

    def __len__(self) -> int:
        return len(self.texts)

    def keep(self, wanted: Sequence[bool]) -> Batch:
        return replace(
            self,
            texts=list(compress(self.texts, wanted)),
            places=list(compress(self.places, wanted)),
            metadata=None if self.metadata is None else list(compress(self.metadata, wanted)),
        )

    def with_texts(self, texts: list[str]) -> Batch:
        return replace(self, texts=texts)


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids: flat ids, tokens per sequence (all > 0), sequences per document (0 if empty)."""

    ids: Array
    sequence_lengths: Array
    sequences_per_document: Array

    def document_tokens(self) -> Array:
        ends = np.concatenate(([0], np.cumsum(self.sequence_lengths)))
        last = np.cumsum(self.sequences_per_document)
        return ends[last] - ends[last - self.sequences_per_document]  # type: ignore[no-any-return]

    def select(self, wanted: Array) -> Encoded:
        """Only the wanted documents (a boolean per document)."""
        sequences = np.repeat(wanted, self.sequences_per_document)
        return Encoded(
            self.ids[np.repeat(sequences, self.sequence_lengths)],
            self.sequence_lengths[sequences],
            self.sequences_per_document[wanted],
        )


@dataclass(frozen=True)
class DocumentCounts:
    """How much some documents are."""

    documents: int
    sequences: int
    tokens: int


@dataclass(slots=True)
class Reject:
    """A document that was not written, where it stands and why."""

    path: str
    place: int
    reason: str
    detail: str = ""


@dataclass(slots=True)
class UnitTally:
    """Counts of one unit: documents read, and every reject. Read = written + rejected, always."""

    documents_read: int = 0
    lines_read: int = 0  # lines or rows the unit covers, to turn relative places into absolute ones
    counts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)  # of all documents that the language step saw
    metadata_found: Counter[str] = field(default_factory=Counter)  # documents that have each key of `metadata`
    notes: Counter[str] = field(default_factory=Counter)  # of documents kept of which something is to be said
    rejects: list[Reject] = field(default_factory=list)
    passages_removed: int = 0
    passage_chars_removed: int = 0
    passage_examples: list[str] = field(default_factory=list)

    def reject(self, path: str, place: int, reason: str, detail: str = "") -> None:
        self.counts[reason] += 1
        self.rejects.append(Reject(path, place, reason, detail[:EXCERPT_CHARS]))

    def reject_where(self, batch: Batch, wanted: Sequence[bool], reason: str) -> Batch:
        """Reject the documents that are not wanted, with the start of their text, and return the others."""
        if all(wanted):
            return batch
        for text, place, keep in zip(batch.texts, batch.places, wanted, strict=True):
            if not keep:
                self.reject(batch.path, place, reason, text)
        return batch.keep(wanted)

    def reject_for(self, batch: Batch, reasons: Sequence[str | None]) -> Batch:
        """Reject the documents that have a reason, with the start of their text, and return the others."""
        for text, place, reason in zip(batch.texts, batch.places, reasons, strict=True):
            if reason is not None:
                self.reject(batch.path, place, reason, text)
        return batch.keep([reason is None for reason in reasons])
