"""Counts over many documents at once in numpy: words, lines, paragraphs, repeats.

A word is a run of characters that are not white space; every Han and Kana character is a word of its own. A
line is what stands between newlines, stripped; a paragraph is a run of lines without a blank one between.
All texts are laid out as one array of code points, so that the rules cost array passes, not Python loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megatron_cpt.corpus.arrays import Array, mix, repeats, sorted_unique

SPACE, ALPHA, CJK, TERMINAL, BULLET = 1, 2, 4, 8, 16
TERMINAL_PUNCTUATION = ".!?\"'。！？…”’」』"
BULLETS = "•●‣▪◦*-–"
_OTHER = 0x10000  # code points above the basic plane share one class
_CJK_RANGES = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00))
# An odd multiplier has an inverse modulo 2^64, by which the hash of a stretch does not depend on its place.
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)


@cache
def _classes() -> Array:
    table = np.zeros(_OTHER + 1, np.uint8)
    for code in range(_OTHER):
        char = chr(code)
        table[code] = SPACE * char.isspace() + ALPHA * char.isalpha()
    for first, stop in _CJK_RANGES:
        table[first:stop] |= CJK
    table[[ord(c) for c in TERMINAL_PUNCTUATION]] |= TERMINAL
    table[[ord(c) for c in BULLETS]] |= BULLET
    table[_OTHER] = ALPHA
    return table


@dataclass(frozen=True)
class Spans:
    """Stretches of the text: first and one past the last character, the document, a hash of the characters."""

    starts: Array
    ends: Array
    documents: Array
    hashes: Array

    @property
    def lengths(self) -> Array:
        return self.ends - self.starts

    def repeated(self) -> Array:
        """True for each span whose text occurred before in its document."""
        return repeats(mix(self.hashes + self.documents.astype(np.uint64) * np.uint64(_MULTIPLIER)))


class TextStatistics:
    """Words, lines and paragraphs of `texts`; everything is computed when first asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.count = len(texts)
        self.chars = np.array([len(text) for text in texts], np.int64)
        # A newline after each text keeps words, lines and marks from running into the next one.
        self.starts = np.cumsum(self.chars + 1) - (self.chars + 1)
        codes = np.frombuffer("".join(f"{text}\n" for text in texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        self.codes = codes
        self.classes = _classes()[np.minimum(codes, _OTHER)]

    def total(self, documents: Array, weights: Array | None = None) -> Array:
        """Sum of `weights` (or the number of items) per document."""
        return np.bincount(documents, weights, self.count)

    @cached_property
    def _hash_sums(self) -> tuple[Array, Array, Array]:
        n = len(self.codes) + 1
        powers = np.full(n, _MULTIPLIER, np.uint64)
        inverses = np.full(n, _INVERSE, np.uint64)
        powers[0] = inverses[0] = 1
        powers = np.multiply.accumulate(powers)
        inverses = np.multiply.accumulate(inverses)
        sums = np.zeros(n, np.uint64)
        np.cumsum((self.codes.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
        return sums, powers, inverses

    def spans(self, starts: Array, ends: Array, documents: Array) -> Spans:
        sums, _, inverses = self._hash_sums
        return Spans(starts, ends, documents, mix((sums[ends] - sums[starts]) * inverses[starts]))

    @cached_property
    def words(self) -> Spans:
        inside = (self.classes & SPACE) == 0
        cjk = (self.classes & CJK) != 0
        starts, ends = inside.copy(), inside.copy()
        starts[1:] &= ~inside[:-1] | cjk[1:] | cjk[:-1]
        ends[:-1] &= ~inside[1:] | cjk[:-1] | cjk[1:]
        start = np.flatnonzero(starts)
        return self.spans(start, np.flatnonzero(ends) + 1, self.document_of(start))

    def document_of(self, places: Array) -> Array:
        return np.searchsorted(self.starts, places, side="right") - 1

    @cached_property
    def word_counts(self) -> Array:
        return self.total(self.words.documents)

    @cached_property
    def words_with_letter(self) -> Array:
        letters = np.concatenate(([0], np.cumsum((self.classes & ALPHA) != 0)))
        return self.total(self.words.documents, letters[self.words.ends] > letters[self.words.starts])

    @cached_property
    def _line_of_word(self) -> Array:
        """How many newlines stand before each word."""
        return np.cumsum(self.codes == 10)[self.words.starts]

    @cached_property
    def lines(self) -> Spans:
        """Lines that have a word."""
        return self._groups(np.diff(self._line_of_word) > 0)

    @cached_property
    def paragraphs(self) -> Spans:
        steps = np.diff(self._line_of_word)
        new_document = np.diff(self.words.documents) > 0
        return self._groups((steps > 1) | new_document)

    def _groups(self, breaks: Array) -> Spans:
        """Words joined into spans, a new one after each True."""
        if not len(self.words.starts):
            return self.words
        begins = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        finishes = np.concatenate((begins[1:], [len(self.words.starts)])) - 1
        return self.spans(self.words.starts[begins], self.words.ends[finishes], self.words.documents[begins])

    def ratio(self, numerator: Array, denominator: Array) -> Array:
        return numerator / np.maximum(denominator, 1)

    def words_present(self, wanted: Sequence[str]) -> Array:
        """How many of the `wanted` words (each counted once) every document has."""
        hashes = TextStatistics(wanted).words.hashes
        present = np.zeros(self.count, np.int64)
        for value in hashes:
            present += self.total(self.words.documents[self.words.hashes == value]) > 0
        return present

    def _ngrams(self, n: int, tell_apart: bool = True) -> tuple[Array, Array]:
        """(keys, first words) of all n-grams of words inside a document; the key may include the document."""
        words = self.words
        if len(words.documents) < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        places = np.flatnonzero(words.documents[: len(words.documents) - n + 1] == words.documents[n - 1 :])
        keys = words.documents[places].astype(np.uint64) * np.uint64(tell_apart)
        for step in range(n):
            keys = keys * np.uint64(_MULTIPLIER) + words.hashes[places + step]
        return mix(keys), places

    def ngram_hashes(self, n: int) -> tuple[Array, Array]:
        """(hash of the words, document) of every n-gram; equal n-grams of two documents have equal hashes."""
        hashes, places = self._ngrams(n, tell_apart=False)
        return hashes, self.words.documents[places]

    def top_ngram_ratio(self, n: int) -> Array:
        """Share of the characters in the n-gram that covers most of them among those that occur twice or more."""
        out = np.zeros(self.count)
        if len(self.words.starts) < n:
            return out
        keys, places = self._ngrams(n)
        order = np.argsort(keys)
        ordered = keys[order]
        begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = np.diff(np.concatenate((begins, [len(ordered)])))
        often = counts > 1
        first = places[order[begins[often]]]
        chars = counts[often] * (self.words.ends[first + n - 1] - self.words.starts[first])
        np.maximum.at(out, self.words.documents[first], chars)
        return self.ratio(out, self.chars)

    def repeated_ngram_ratios(self, sizes: Sequence[int]) -> dict[int, Array]:
        """n -> share of the characters in n-grams that occurred before in the document, overlaps counted once.

        Sizes must ascend: an n-gram can only repeat where the next smaller one does, so later sizes look
        only there.
        """
        out: dict[int, Array] = {}
        candidates: Array | None = None
        for n in sizes:
            if len(self.words.starts) < n:
                out[n] = np.zeros(self.count)
                continue
            keys, places = self._ngrams(n)
            if candidates is not None:
                near = candidates[places]
                keys, places = keys[near], places[near]
            ordered = np.sort(keys)
            twice = sorted_unique(ordered[1:][ordered[1:] == ordered[:-1]])
            again = np.isin(keys, twice)
            candidates = np.zeros(len(self.words.starts), bool)
            candidates[places[again]] = True
            keys, places = keys[again], places[again]
            out[n] = self._covered_ratio(places[repeats(keys)], n)
        return out

    def _covered_ratio(self, first_words: Array, n: int) -> Array:
        """Share of each document's characters in the words of the n-grams that begin at `first_words`."""
        depth = np.zeros(len(self.words.starts) + 1, np.int64)
        np.add.at(depth, first_words, 1)
        np.add.at(depth, first_words + n, -1)
        covered = np.cumsum(depth)[:-1] > 0
        return self.ratio(self.total(self.words.documents[covered], self.words.lengths[covered] + 1.0), self.chars)

    def class_of(self, places: Array, wanted: int) -> Array:
        return (self.classes[places] & wanted) != 0  # type: ignore[no-any-return]
