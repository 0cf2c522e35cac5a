"""Filters that took more of a source than expected: said in words, with an example and the key to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.rejects import absolute_rejects

# Beginning of a reason -> the key of `filters` that it belongs to; the first that fits.
_FILTER_OF_REASON = {
    "too_short": "min_chars", "too_long": "max_chars", "language": "language", "gopher_repeated": "gopher_repetition",
    "gopher_top": "gopher_repetition", "gopher_": "gopher_quality", "c4_": "c4", "bad_words": "bad_words",
    "fineweb_": "fineweb", "code_": "code", "perplexity": "perplexity", "custom:": "custom",
}  # fmt: skip
_WHAT_TO_CHANGE = {
    "language": "lower filters.language.min_score (terms of art and code make the model unsure) or add to keep",
    "perplexity": "raise filters.perplexity.max_perplexity",
    "min_chars": "lower filters.min_chars",
    "max_chars": "raise filters.max_chars",
}
# Rejects looked at for an example.
_SEARCHED = 100_000


def filter_warnings(staging: Path, done: FinishedUnits, warn_ratio: float) -> Iterator[str]:
    """Yield a line for each filter that dropped more than `warn_ratio` of the documents of a source."""
    read: Counter[str] = Counter()
    dropped: dict[tuple[str, str], Counter[str]] = {}
    for record in done.records:
        read[record.source] += record.documents_read
        for reason, count in record.reject_counts.items():
            if (name := _filter_of(reason)) is not None:
                dropped.setdefault((record.source, name), Counter())[reason] += count
    for (source, name), reasons in dropped.items():
        if reasons.total() > warn_ratio * read[source]:
            found = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
            example = _example(staging, done, source, reasons.most_common(1)[0][0])
            yield (
                f"source {source!r}: filters.{name} dropped {reasons.total():,} of {read[source]:,} documents "
                f"({reasons.total() / read[source]:.1%}; {found}), more than warn_filter_ratio {warn_ratio:g}"
                f"{example}; if that is too many: "
                + _WHAT_TO_CHANGE.get(name, f"state a milder limit in filters.{name}, or filters.preset: technical")
            )


def _filter_of(reason: str) -> str | None:
    return next((name for start, name in _FILTER_OF_REASON.items() if reason.startswith(start)), None)


def _example(staging: Path, done: FinishedUnits, source: str, reason: str) -> str:
    sources = {path: unit.source for unit in done.units for path in unit.paths}
    rejects: Iterator[dict[str, Any]] = absolute_rejects(staging, done)
    for _, reject in zip(range(_SEARCHED), rejects, strict=False):
        if reject["reason"] == reason and sources.get(reject["file"]) == source:
            return f". For example {reject['file']}:{reject['line']}: {' '.join(reject['detail'].split())[:90]}"
    return ""
