"""Documents without text, and documents that are too short or too long."""

from __future__ import annotations

import sys

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step


def drop_empty(batch: Batch, tally: UnitTally) -> Batch:
    """Reject documents of nothing but white space."""
    wanted = [bool(text) and not text.isspace() for text in batch.texts]
    return batch if all(wanted) else tally.reject_where(batch, wanted, "empty")


def length_step(min_chars: int | None, max_chars: int | None) -> Step:
    """Reject documents of fewer or more characters than stated."""
    low, high = min_chars or 0, max_chars or sys.maxsize

    def check_length(batch: Batch, tally: UnitTally) -> Batch:
        for text, place in zip(batch.texts, batch.places, strict=True):
            if not low <= len(text) <= high:
                reason, limit = (
                    ("too_short", f"at least {low:,}") if len(text) < low else ("too_long", f"at most {high:,}")
                )
                tally.reject(batch.path, place, reason, f"{len(text):,} characters, allowed {limit}: {text}")
        return batch.keep([low <= len(text) <= high for text in batch.texts])

    return Step("length", check_length)
