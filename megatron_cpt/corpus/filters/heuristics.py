"""Published quality rules over a batch of documents; thresholds are the papers' unless the corpus states others.

    gopher_quality, gopher_repetition   Rae et al. 2021, Scaling Language Models (Gopher), appendix A.1.1, table A1
    fineweb                             Penedo et al. 2024, The FineWeb Datasets, section 3.6

Each rule gives the first reason for which a document fails, such as `gopher_word_count`. The rules were made
for languages with spaces; for Chinese set `min_mean_word_length: 1` and leave out the stop words.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.filters.text_statistics import BULLET, TERMINAL, TextStatistics
from megatron_cpt.corpus.schema_processing import Filters, FineWeb, GopherQuality, GopherRepetition

Rule = tuple[str, Array]  # reason, True where the document fails
# Documents whose statistics are computed together: enough to amortise a numpy call, few enough for the cache.
STATISTICS_CHARS = 1 << 18


def heuristics_step(filters: Filters) -> Step:
    """The published rules that `filters` asks for; they share one set of counts per group of documents."""

    def check_rules(batch: Batch, tally: UnitTally) -> Batch:
        reasons: list[str | None] = []
        for first, last in _groups(batch):
            reasons += _first_reasons(TextStatistics(batch.texts[first:last]), filters)
        return tally.reject_for(batch, reasons)

    return Step("heuristics", check_rules)


def _first_reasons(statistics: TextStatistics, filters: Filters) -> list[str | None]:
    """For each document the first rule it breaks."""
    found = np.zeros(statistics.count, np.int64)
    names: list[str] = []
    for name, fails in _rules(statistics, filters):
        names.append(name)
        found = np.where((found == 0) & fails, len(names), found)
    return [names[index - 1] if index else None for index in found.tolist()]


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
    yield "gopher_word_count", (words < limits.min_words) | (words > limits.max_words)
    mean = text.ratio(text.total(text.words.documents, text.words.lengths), words)
    yield "gopher_mean_word_length", (mean < limits.min_mean_word_length) | (mean > limits.max_mean_word_length)
    symbols = text.ratio(_symbols(text), words)
    yield "gopher_symbol_ratio", symbols > limits.max_symbol_word_ratio
    line_counts = text.total(text.lines.documents)
    bullets = text.total(text.lines.documents, text.class_of(text.lines.starts, BULLET))
    yield "gopher_bullet_lines", text.ratio(bullets, line_counts) > limits.max_bullet_line_ratio
    ellipses = text.total(text.lines.documents, _ends_with_ellipsis(text))
    yield "gopher_ellipsis_lines", text.ratio(ellipses, line_counts) > limits.max_ellipsis_line_ratio
    yield "gopher_alphabetic_words", text.ratio(text.words_with_letter, words) < limits.min_alphabetic_word_ratio
    if limits.stop_words:
        yield "gopher_stop_words", text.words_present(limits.stop_words) < limits.min_stop_words


def gopher_repetition(text: TextStatistics, limits: GopherRepetition) -> Iterator[Rule]:
    for name, spans, max_count, max_chars in (
        ("lines", text.lines, limits.max_repeated_lines, limits.max_repeated_line_chars),
        ("paragraphs", text.paragraphs, limits.max_repeated_paragraphs, limits.max_repeated_paragraph_chars),
    ):
        again = spans.repeated()
        share = text.ratio(text.total(spans.documents, again), text.total(spans.documents))
        yield f"gopher_repeated_{name}", share > max_count
        chars = text.ratio(text.total(spans.documents, again * spans.lengths), text.chars)
        yield f"gopher_repeated_{name}_chars", chars > max_chars
    for n, limit in limits.max_top_ngram_chars.items():
        yield f"gopher_top_{n}gram", text.top_ngram_ratio(n) > limit
    sizes = sorted(limits.max_repeated_ngram_chars)
    for n, share in text.repeated_ngram_ratios(sizes).items():
        yield f"gopher_repeated_{n}gram", share > limits.max_repeated_ngram_chars[n]


def fineweb(text: TextStatistics, limits: FineWeb) -> Iterator[Rule]:
    lines = text.lines
    counts = text.total(lines.documents)
    terminal = text.total(lines.documents, text.class_of(lines.ends - 1, TERMINAL))
    yield "fineweb_line_punctuation", text.ratio(terminal, counts) <= limits.min_terminal_line_ratio
    again = text.total(lines.documents, lines.repeated() * lines.lengths)
    yield "fineweb_repeated_lines", text.ratio(again, text.chars) >= limits.max_repeated_line_chars
    short = text.total(lines.documents, lines.lengths < limits.short_line_chars)
    yield "fineweb_short_lines", text.ratio(short, counts) >= limits.max_short_line_ratio


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
