"""Published quality rules over a batch of documents; thresholds are the papers' unless the corpus states others.

    gopher_quality, gopher_repetition   Rae et al. 2021, Scaling Language Models (Gopher), appendix A.1.1, table A1
    fineweb                             Penedo et al. 2024, The FineWeb Datasets, section 3.6

Each rule gives the first reason for which a document fails, such as `gopher_word_count`. The rules were made
for languages with spaces; for Chinese set `min_mean_word_length: 1` and leave out the stop words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.filters.text_statistics import BULLET, TERMINAL, TextStatistics
from megatron_cpt.corpus.schema_processing import Filters, FineWeb, GopherQuality, GopherRepetition


class Rule(NamedTuple):
    """A rule on a group of documents."""

    reason: str
    fails: Array  # True where the document fails
    values: Array  # what was compared
    limit: str  # with what


def _at_least(reason: str, values: Array, limit: float) -> Rule:
    return Rule(reason, values < limit, values, f"at least {limit:g}")


def _at_most(reason: str, values: Array, limit: float) -> Rule:
    return Rule(reason, values > limit, values, f"at most {limit:g}")


def _between(reason: str, values: Array, low: float, high: float) -> Rule:
    return Rule(reason, (values < low) | (values > high), values, f"from {low:g} to {high:g}")


# Documents whose statistics are computed together: enough to amortise a numpy call, few enough for the cache.
STATISTICS_CHARS = 1 << 18


def heuristics_step(filters: Filters) -> Step:
    """The published rules that `filters` asks for; they share one set of counts per group of documents."""

    def check_rules(batch: Batch, tally: UnitTally) -> Batch:
        broken: list[tuple[str, str] | None] = []
        for first, last in _groups(batch):
            broken += _first_broken(TextStatistics(batch.texts[first:last]), filters)
        for text, place, found in zip(batch.texts, batch.places, broken, strict=True):
            if found is not None:
                tally.reject(batch.path, place, found[0], f"{found[1]}: {text}")
        return batch.keep([found is None for found in broken])

    return Step("heuristics", check_rules)


def _first_broken(statistics: TextStatistics, filters: Filters) -> list[tuple[str, str] | None]:
    """For each document the first rule it breaks, with the value and the limit."""
    found: list[tuple[str, str] | None] = [None] * statistics.count
    for rule in _rules(statistics, filters):
        for index in np.flatnonzero(rule.fails).tolist():
            found[index] = found[index] or (rule.reason, f"{rule.values[index]:.4g}, allowed {rule.limit}")
    return found


def _rules(statistics: TextStatistics, filters: Filters) -> Iterator[Rule]:
    if filters.gopher_quality is not None:
        yield from gopher_quality(statistics, filters.gopher_quality)
    if filters.gopher_repetition is not None:
        yield from gopher_repetition(statistics, filters.gopher_repetition)
    if filters.fineweb is not None:
        yield from fineweb(statistics, filters.fineweb)


def _groups(batch: Batch) -> Iterator[tuple[int, int]]:
    first, chars = 0, 0
    for index, text in enumerate(batch.texts):
        chars += len(text)
        if chars >= STATISTICS_CHARS or index == len(batch) - 1:
            yield first, index + 1
            first, chars = index + 1, 0


def gopher_quality(text: TextStatistics, limits: GopherQuality) -> Iterator[Rule]:
    words = text.word_counts
    yield _between("gopher_word_count", words, limits.min_words, limits.max_words)
    mean = text.ratio(text.total(text.words.documents, text.words.lengths), words)
    yield _between("gopher_mean_word_length", mean, limits.min_mean_word_length, limits.max_mean_word_length)
    yield _at_most("gopher_symbol_ratio", text.ratio(_symbols(text), words), limits.max_symbol_word_ratio)
    line_counts = text.total(text.lines.documents)
    bullets = text.total(text.lines.documents, text.class_of(text.lines.starts, BULLET))
    yield _at_most("gopher_bullet_lines", text.ratio(bullets, line_counts), limits.max_bullet_line_ratio)
    ellipses = text.total(text.lines.documents, _ends_with_ellipsis(text))
    yield _at_most("gopher_ellipsis_lines", text.ratio(ellipses, line_counts), limits.max_ellipsis_line_ratio)
    alphabetic = text.ratio(text.words_with_letter, words)
    yield _at_least("gopher_alphabetic_words", alphabetic, limits.min_alphabetic_word_ratio)
    if limits.stop_words:
        yield _at_least("gopher_stop_words", text.words_present(limits.stop_words), limits.min_stop_words)


def gopher_repetition(text: TextStatistics, limits: GopherRepetition) -> Iterator[Rule]:
    for name, spans, max_count, max_chars in (
        ("lines", text.lines, limits.max_repeated_lines, limits.max_repeated_line_chars),
        ("paragraphs", text.paragraphs, limits.max_repeated_paragraphs, limits.max_repeated_paragraph_chars),
    ):
        again = spans.repeated()
        share = text.ratio(text.total(spans.documents, again), text.total(spans.documents))
        yield _at_most(f"gopher_repeated_{name}", share, max_count)
        chars = text.ratio(text.total(spans.documents, again * spans.lengths), text.chars)
        yield _at_most(f"gopher_repeated_{name}_chars", chars, max_chars)
    for n, limit in limits.max_top_ngram_chars.items():
        yield _at_most(f"gopher_top_{n}gram", text.top_ngram_ratio(n), limit)
    sizes = sorted(limits.max_repeated_ngram_chars)
    for n, share in text.repeated_ngram_ratios(sizes).items():
        yield _at_most(f"gopher_repeated_{n}gram", share, limits.max_repeated_ngram_chars[n])


def fineweb(text: TextStatistics, limits: FineWeb) -> Iterator[Rule]:
    lines = text.lines
    counts = text.total(lines.documents)
    terminal = text.ratio(text.total(lines.documents, text.class_of(lines.ends - 1, TERMINAL)), counts)
    least = limits.min_terminal_line_ratio
    yield Rule("fineweb_line_punctuation", terminal <= least, terminal, f"more than {least:g}")
    again = text.ratio(text.total(lines.documents, lines.repeated() * lines.lengths), text.chars)
    most = limits.max_repeated_line_chars
    yield Rule("fineweb_repeated_lines", again >= most, again, f"less than {most:g}")
    short = text.ratio(text.total(lines.documents, lines.lengths < limits.short_line_chars), counts)
    most = limits.max_short_line_ratio
    yield Rule("fineweb_short_lines", short >= most, short, f"less than {most:g}")


def _symbols(text: TextStatistics) -> Array:
    """Hash signs and ellipses per document."""
    hashes = np.flatnonzero(text.codes == ord("#"))
    ellipses = np.flatnonzero(_ellipsis_ends(text))
    places = np.concatenate((hashes, ellipses))
    return text.total(text.document_of(places))


def _ellipsis_ends(text: TextStatistics) -> Array:
    """True at the last character of `...` (a run of dots counts once) and at `…`."""
    dots: Array = text.codes == ord(".")
    ends: Array = text.codes == ord("…")
    if len(dots) > 2:
        three = dots[2:] & dots[1:-1] & dots[:-2]
        three[:-1] &= ~dots[3:]
        ends = ends.copy()
        ends[2:] |= three
    return ends


def _ends_with_ellipsis(text: TextStatistics) -> Array:
    ends: Array = _ellipsis_ends(text)[text.lines.ends - 1]
    return ends
