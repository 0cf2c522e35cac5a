"""Passages (lines or paragraphs) that documents share: how they are cut and told apart, and how they are taken out.

Two passages are the same when they differ only in case and white space; a 63-bit hash stands for each. Passages
shorter than the rule's `min_chars` are never counted and never removed by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import EXCERPT_CHARS, Batch, UnitTally
from megatron_cpt.corpus.schema_processing import Passages

REASON = "repeated_passages"
EXAMPLES_PER_UNIT = 3
SHORT = 0  # the key of a passage that is too short to count
FIRST = np.uint64(1)  # keys are even; where they are stored, this bit says that the first occurrence is in this unit

_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class CutTexts:
    """The passages of some documents in order, flat: their text, their key, the document each is of."""

    passages: list[str]
    keys: Array
    documents: Array


def cut_texts(texts: Sequence[str], rule: Passages) -> CutTexts:
    """Cut documents into lines or paragraphs and hash each."""
    passages: list[str] = []
    counts = []
    for text in texts:
        own = text.split("\n") if rule.unit == "lines" else _BLANK.split(text)
        passages += own
        counts.append(len(own))
    keys = np.array([_key(passage, rule.min_chars) for passage in passages], np.uint64)
    return CutTexts(passages, keys, np.repeat(np.arange(len(texts)), counts))


def _key(passage: str, min_chars: int) -> int:
    normal = " ".join(passage.lower().split())
    if len(normal) < min_chars:
        return SHORT
    return (xxhash.xxh3_64_intdigest(normal.encode()) & ~1) or 2


def documents_per_key(cut: CutTexts) -> tuple[Array, Array]:
    """(distinct keys in order, the number of documents that hold each)."""
    order = np.lexsort((cut.documents, cut.keys))
    keys, documents = cut.keys[order], cut.documents[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (documents[1:] != documents[:-1])
    return np.unique(keys[new & (keys != SHORT)], return_counts=True)


class PassageRemover:
    """Takes the repeated passages out of the documents of one unit, which must come in input order."""

    def __init__(self, rule: Passages, repeated: Array) -> None:
        """`repeated`: the repeated keys that occur in this unit, ascending, each with its bit FIRST."""
        self._rule = rule
        self._keys = repeated & ~FIRST
        self._seen = repeated & FIRST == 0

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        """Remove all but the first occurrence; reject documents of which only short passages stay."""
        cut = cut_texts(batch.texts, self._rule)
        drop = self._to_drop(cut.keys)
        changed = np.unique(cut.documents[drop])
        if not len(changed):
            return batch
        self._count(cut, drop, tally)
        texts, wanted = list(batch.texts), [True] * len(batch)
        ends = np.searchsorted(cut.documents, np.arange(len(batch) + 1)).tolist()
        for document in changed.tolist():
            begin, end = ends[document], ends[document + 1]
            stays = ~drop[begin:end]
            wanted[document] = bool((cut.keys[begin:end][stays] != SHORT).any())
            if wanted[document]:
                texts[document] = self._join([cut.passages[begin + i] for i in np.flatnonzero(stays).tolist()])
        return tally.reject_where(batch.with_texts(texts), wanted, REASON)

    def _to_drop(self, keys: Array) -> Array:
        """True for every occurrence of a repeated passage but its first in the corpus."""
        drop = np.zeros(len(keys), bool)
        if not len(self._keys):
            return drop
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        drop |= self._keys[places] == keys
        met, first = np.unique(places[drop], return_index=True)
        drop[np.flatnonzero(drop)[first[~self._seen[met]]]] = False
        self._seen[met] = True
        return drop

    def _count(self, cut: CutTexts, drop: Array, tally: UnitTally) -> None:
        removed = [cut.passages[i] for i in np.flatnonzero(drop).tolist()]
        tally.passages_removed += len(removed)
        tally.passage_chars_removed += sum(map(len, removed))
        room = EXAMPLES_PER_UNIT - len(tally.passage_examples)
        tally.passage_examples += [passage.strip()[:EXCERPT_CHARS] for passage in removed[:room]]

    def _join(self, passages: list[str]) -> str:
        """The text of what stays, without the holes: at most one blank line in a row, none at the ends."""
        if self._rule.unit == "paragraphs":
            return "\n\n".join(passages).strip("\n")
        return _BLANK.sub("\n\n", "\n".join(passages)).strip("\n")
