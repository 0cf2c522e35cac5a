"""What flows between the steps: batches of documents, and the account of those that did not get through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

# Reasons that mean unreadable input rather than a choice of the user; `max_reject_ratio` counts only these.
BAD_INPUT_REASONS = frozenset(
    {
        "invalid_json", "invalid_utf8", "lone_surrogate", "not_an_object", "missing_key", "text_not_a_string",
        "document_too_long", "unreadable",
    }
)  # fmt: skip
EXCERPT_CHARS = 200


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

    def __len__(self) -> int:
        return len(self.texts)

    def keep(self, wanted: Sequence[bool]) -> Batch:
        return Batch(
            self.path,
            list(compress(self.texts, wanted)),
            list(compress(self.places, wanted)),
            None if self.metadata is None else list(compress(self.metadata, wanted)),
        )

    def with_texts(self, texts: list[str]) -> Batch:
        return Batch(self.path, texts, self.places, self.metadata)


@dataclass(slots=True)
class Reject:
    """A document that was not written, where it stands and why."""

    path: str
    place: int
    reason: str
    detail: str = ""


@dataclass(slots=True)
class Ledger:
    """The account of a unit: documents read, and every reject. Read = written + rejected, always."""

    documents_read: int = 0
    lines_read: int = 0  # lines or rows the unit covers, to turn relative places into absolute ones
    counts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)  # of all documents that the language step saw
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
