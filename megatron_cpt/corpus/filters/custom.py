"""The user's own filters: a function from text to True (keep), False (reject), or the text to go on with."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.errors import ConfigError, DataError


def custom_step(name: str) -> Step:
    """The step that calls `module:function`. Raises ConfigError when it cannot be imported."""
    function = _load(name)

    def apply(batch: Batch, tally: UnitTally) -> Batch:
        answers = [
            _answer(name, function, text, f"{batch.path}:{place}")
            for text, place in zip(batch.texts, batch.places, strict=True)
        ]
        for text, place, answer in zip(batch.texts, batch.places, answers, strict=True):
            if answer is False or answer is None:
                tally.reject(batch.path, place, f"custom:{name}", text)
        changed = [answer if isinstance(answer, str) else t for t, answer in zip(batch.texts, answers, strict=True)]
        return batch.with_texts(changed).keep([answer is not False and answer is not None for answer in answers])

    return Step(f"custom:{name}", apply)


def _load(name: str) -> Callable[[str], object]:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[[str], object] = getattr(importlib.import_module(module_name), function_name)
        return function
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"custom filter {name!r} cannot be loaded: {error}", hint="write module:function, importable from here"
        ) from error
    finally:
        sys.path.pop(0)


def _answer(name: str, function: Callable[[str], object], text: str, where: str) -> object:
    """What the user's function says of a text. Raises DataError for an exception, or another kind of answer."""
    try:
        answer = function(text)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"custom filter {name!r} raised {type(error).__name__}: {error} ({at.filename}:{at.lineno}) on {where}",
            hint="fix the function; the same command continues where it stopped",
        ) from error
    if answer is None or isinstance(answer, (bool, str, np.bool_)):
        return answer if not isinstance(answer, np.bool_) else bool(answer)
    raise DataError(
        f"custom filter {name!r} returned {type(answer).__name__} on {where}",
        hint="return True to keep, False to reject, or the text to go on with",
    )
