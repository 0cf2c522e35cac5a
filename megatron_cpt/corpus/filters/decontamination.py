"""Documents that contain parts of evaluation sets, found by shared n-grams of words and dropped.

Brown et al. 2020 (GPT-3), appendix C: n-grams of 13 words, without regard to case and punctuation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.text_statistics import TextStatistics
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.corpus.schema_processing import Decontaminate
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)

_PUNCTUATION = re.compile(r"[^\w\s]+|_")


class Decontaminator:
    """A step that rejects documents with n-grams of the evaluation sets, which are read once at start."""

    def __init__(self, settings: Decontaminate, corpus: Corpus) -> None:
        self._settings = settings
        self._ngrams = self._read_evaluation_sets(corpus)

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        hashes, documents = _ngram_hashes(batch.texts, self._settings.ngram_words)
        shared = np.bincount(documents[np.isin(hashes, self._ngrams)], minlength=len(batch))
        return tally.reject_where(batch, (shared < self._settings.min_matches).tolist(), "contaminated")

    def _read_evaluation_sets(self, corpus: Corpus) -> Array:
        source = Source(name="evaluation", files=self._settings.files, text=self._settings.text)
        tally, found, examples, short = UnitTally(), [], 0, 0
        for unit in plan_units(corpus.model_copy(update={"sources": (source,)})):
            for batch in read_unit(unit, tally, corpus.max_document_bytes):
                hashes, documents = _ngram_hashes(batch.texts, self._settings.ngram_words)
                found.append(hashes)
                examples += len(batch)
                short += len(batch) - len(np.unique(documents))
        if tally.rejects:
            first, reasons = tally.rejects[0], ", ".join(f"{n:,} {reason}" for reason, n in tally.counts.items())
            raise DataError(
                f"decontaminate: {len(tally.rejects):,} of {tally.documents_read:,} evaluation examples cannot be read "
                f"({reasons}), the first in {first.path}:{first.place}: {first.detail}",
                hint="fix the files, or name the key of their text in decontaminate.text",
            )
        if not examples or short == examples:
            raise DataError(
                f"decontaminate: none of {examples:,} evaluation examples has {self._settings.ngram_words} words",
                hint="check decontaminate.files and .text, or lower ngram_words",
            )
        if short:
            log.warning(
                "decontaminate: %d of %d evaluation examples have fewer than %d words and cannot be looked for",
                short, examples, self._settings.ngram_words,
            )  # fmt: skip
        return np.unique(np.concatenate(found))


def _ngram_hashes(texts: Sequence[str], n: int) -> tuple[Array, Array]:
    """(hash, document) of every n-gram of words, in lower case and without punctuation."""
    statistics = TextStatistics([_PUNCTUATION.sub(" ", text.lower()) for text in texts])
    return statistics.ngram_hashes(n)
