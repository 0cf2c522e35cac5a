"""The steps between reading and tokenising: batches in, batches out, every drop with a reason in the ledger."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.filters.bad_words import BadWordFilter
from megatron_cpt.corpus.filters.cleaning import Cleaner, cleaners
from megatron_cpt.corpus.filters.code_quality import code_problem
from megatron_cpt.corpus.filters.heuristics import Rule, fineweb, gopher_quality, gopher_repetition
from megatron_cpt.corpus.filters.language import language_identifier
from megatron_cpt.corpus.filters.perplexity import PerplexityCeiling
from megatron_cpt.corpus.filters.text_statistics import TextStatistics
from megatron_cpt.corpus.schema_processing import Clean, CodeQuality, Filters, Language
from megatron_cpt.errors import ConfigError, DataError

Step = Callable[[Batch, Ledger], Batch]

# Documents whose statistics are computed together: enough to amortise a numpy call, few enough for the cache.
STATISTICS_CHARS = 1 << 18
_C4_MIN_SENTENCES = 5


def build_steps(clean: Clean, filters: Filters, keep_empty: bool) -> list[Step]:
    """All steps that a source asks for, in order. Loads models; raises for what cannot be loaded."""
    steps: list[Step] = []
    if functions := cleaners(clean):
        steps.append(lambda batch, ledger: _clean(functions, batch))
    if not keep_empty:
        steps.append(drop_empty)
    if filters.min_chars is not None or filters.max_chars is not None:
        low, high = filters.min_chars or 0, filters.max_chars or sys.maxsize
        steps.append(lambda batch, ledger: _length(low, high, batch, ledger))
    if (language := filters.language) is not None:
        identify = language_identifier()
        steps.append(lambda batch, ledger: _language(identify, language, batch, ledger))
    if filters.gopher_quality or filters.gopher_repetition or filters.fineweb:
        steps.append(lambda batch, ledger: _heuristics(filters, batch, ledger))
    if filters.c4:
        steps.append(_c4)
    if filters.bad_words is not None:
        steps.append(BadWordFilter(filters.bad_words))
    if (code := filters.code) is not None:
        steps.append(lambda batch, ledger: _code(code, batch, ledger))
    if filters.perplexity is not None:
        steps.append(PerplexityCeiling(filters.perplexity))
    steps += [_custom(name) for name in filters.custom]
    return steps


def drop_empty(batch: Batch, ledger: Ledger) -> Batch:
    """Reject documents of nothing but white space."""
    wanted = [bool(text) and not text.isspace() for text in batch.texts]
    return batch if all(wanted) else ledger.reject_where(batch, wanted, "empty")


def _clean(functions: list[Cleaner], batch: Batch) -> Batch:
    texts = batch.texts
    for function in functions:
        texts = [function(text) for text in texts]
    return batch.with_texts(texts)


def _length(low: int, high: int, batch: Batch, ledger: Ledger) -> Batch:
    batch = ledger.reject_where(batch, [len(text) >= low for text in batch.texts], "too_short")
    return ledger.reject_where(batch, [len(text) <= high for text in batch.texts], "too_long")


def _language(identify: Callable[[str], tuple[str, float]], language: Language, batch: Batch, ledger: Ledger) -> Batch:
    wanted = []
    for text, place in zip(batch.texts, batch.places, strict=True):
        code, score = identify(text)
        ledger.languages[code] += 1
        wanted.append(code in language.keep and score >= language.min_score)
        if not wanted[-1]:
            ledger.reject(batch.path, place, "language", f"{code} {score:.2f}: {text}")
    return batch.keep(wanted)


def _heuristics(filters: Filters, batch: Batch, ledger: Ledger) -> Batch:
    """The vectorised rules on groups of documents; a document is rejected for the first rule it breaks."""
    reasons: list[str | None] = []
    for first, last in _groups(batch):
        statistics = TextStatistics(batch.texts[first:last])
        found = np.zeros(last - first, np.int64)
        names: list[str] = []
        for name, fails in _rules(filters, statistics):
            names.append(name)
            found = np.where((found == 0) & fails, len(names), found)
        reasons += [names[index - 1] if index else None for index in found.tolist()]
    for text, place, reason in zip(batch.texts, batch.places, reasons, strict=True):
        if reason is not None:
            ledger.reject(batch.path, place, reason, text)
    return batch.keep([reason is None for reason in reasons])


def _rules(filters: Filters, statistics: TextStatistics) -> Iterator[Rule]:
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


def _c4(batch: Batch, ledger: Ledger) -> Batch:
    """C4's rules for pages; its word list is a filter of its own, `bad_words`."""
    batch = ledger.reject_where(batch, ["lorem ipsum" not in t.lower() for t in batch.texts], "c4_lorem_ipsum")
    batch = ledger.reject_where(batch, ["{" not in text for text in batch.texts], "c4_curly_bracket")
    enough = [sum(map(text.count, ".!?。！？")) >= _C4_MIN_SENTENCES for text in batch.texts]
    return ledger.reject_where(batch, enough, "c4_few_sentences")


def _code(limits: CodeQuality, batch: Batch, ledger: Ledger) -> Batch:
    problems = [code_problem(text, limits) for text in batch.texts]
    for text, place, problem in zip(batch.texts, batch.places, problems, strict=True):
        if problem is not None:
            ledger.reject(batch.path, place, problem, text)
    return batch.keep([problem is None for problem in problems])


def _answer(name: str, function: Callable[[str], object], text: str, where: str) -> object:
    """What the user's function says of a text. Raises DataError for an exception, or another kind of answer."""
    try:
        answer = function(text)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"custom filter {name!r} raised {type(error).__name__}: {error} ({at.filename}:{at.lineno}) on {where}",
            hint="mend the function; the same command continues where it stopped",
        ) from error
    if answer is None or isinstance(answer, (bool, str, np.bool_)):
        return answer if not isinstance(answer, np.bool_) else bool(answer)
    raise DataError(
        f"custom filter {name!r} returned {type(answer).__name__} on {where}",
        hint="return True to keep, False to reject, or the text to go on with",
    )


def _custom(name: str) -> Step:
    """A user's function: True keeps, False rejects, a string replaces the text."""
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"custom filter {name!r} cannot be loaded: {error}", hint="write module:function, importable from here"
        ) from error
    finally:
        sys.path.pop(0)

    def step(batch: Batch, ledger: Ledger) -> Batch:
        answers = [
            _answer(name, function, text, f"{batch.path}:{p}")
            for text, p in zip(batch.texts, batch.places, strict=True)
        ]
        for text, place, answer in zip(batch.texts, batch.places, answers, strict=True):
            if answer is False or answer is None:
                ledger.reject(batch.path, place, f"custom:{name}", text)
        changed = [answer if isinstance(answer, str) else t for t, answer in zip(batch.texts, answers, strict=True)]
        return batch.with_texts(changed).keep([answer is not False and answer is not None for answer in answers])

    return step
