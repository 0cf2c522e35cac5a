"""All steps of a source in their order: cleaning, then the filters of FILTERS, then the user's own."""

from __future__ import annotations

from collections.abc import Callable

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.bad_words import BadWordFilter
from megatron_cpt.corpus.filters.c4 import c4_pages
from megatron_cpt.corpus.filters.cleaning import Cleaner, cleaners, html_cleaner
from megatron_cpt.corpus.filters.code_quality import code_step
from megatron_cpt.corpus.filters.custom import custom_step
from megatron_cpt.corpus.filters.heuristics import heuristics_step
from megatron_cpt.corpus.filters.language import language_step
from megatron_cpt.corpus.filters.length import drop_empty, length_step
from megatron_cpt.corpus.filters.perplexity import PerplexityCeiling
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.filters.time_limit import with_time_limit
from megatron_cpt.corpus.schema_processing import Clean, Filters

# Name -> the step, or None where the corpus does not ask for it; applied in this order.
# To add a filter: its thresholds in schema_processing.Filters, its rule in a file here, a line in this table.
FILTERS: dict[str, Callable[[Filters], Step | None]] = {
    "length": lambda f: None if f.min_chars is f.max_chars is None else length_step(f.min_chars, f.max_chars),
    "language": lambda f: language_step(f.language) if f.language else None,
    "heuristics": lambda f: heuristics_step(f) if f.gopher_quality or f.gopher_repetition or f.fineweb else None,
    "c4": lambda f: Step("c4", c4_pages) if f.c4 else None,
    "bad_words": lambda f: Step("bad_words", BadWordFilter(f.bad_words)) if f.bad_words else None,
    "code": lambda f: code_step(f.code) if f.code else None,
    "perplexity": lambda f: Step("perplexity", PerplexityCeiling(f.perplexity)) if f.perplexity else None,
}


def build_steps(clean: Clean, filters: Filters, keep_empty: bool, max_document_seconds: float) -> list[Step]:
    """All steps that a source asks for, in order. Loads models; raises for what cannot be loaded."""
    steps: list[Step] = []
    if (strip := html_cleaner(clean)) is not None:
        steps.append(_html_step(strip))
    if functions := cleaners(clean):
        steps.append(_clean_step(functions))
    if not keep_empty:
        steps.append(Step("drop_empty", drop_empty))
    steps += [step for build in FILTERS.values() if (step := build(filters)) is not None]
    steps += [custom_step(name) for name in filters.custom]
    return [with_time_limit(step, max_document_seconds) for step in steps]


def _html_step(strip: Cleaner) -> Step:
    """Pages are text since they were read: once more would take what they show of HTML itself."""

    def strip_texts(batch: Batch, tally: UnitTally) -> Batch:
        return batch if batch.from_pages else batch.with_texts(list(map(strip, batch.texts)))

    return Step("html", strip_texts)


def _clean_step(functions: list[Cleaner]) -> Step:
    def clean(batch: Batch, tally: UnitTally) -> Batch:
        texts = batch.texts
        for function in functions:
            texts = [function(text) for text in texts]
        return batch.with_texts(texts)

    return Step("clean", clean)
