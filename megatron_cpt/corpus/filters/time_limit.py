"""A limit on the processor time of a step per document: what takes longer becomes a counted reject, `too_slow`.

Every rule of ours takes linear time; a regular expression or a function of the user's may not. The time is that of the
processor, so that a busy machine rejects nothing. A batch over the limit is done again document by document, which
finds the one to reject. Work inside a library of C ends before it is stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step


class _OverTheLimit(BaseException):
    """Not an Exception: a filter of the user's must not swallow it."""


def with_time_limit(step: Step, seconds: float) -> Step:
    """Return the step with a limit of `seconds` of processor time per document."""
    return Step(step.name, _Limited(step, seconds))


class _Limited:
    def __init__(self, step: Step, seconds: float) -> None:
        self._step, self._seconds = step, seconds
        self._one_by_one = False  # once a batch took too long, do not try whole ones again

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        if threading.current_thread() is not threading.main_thread():
            return self._step(batch, tally)  # signals reach the main thread only
        if not self._one_by_one and (done := self._try(batch, tally)) is not None:
            return done
        self._one_by_one = True
        return _joined(batch, [self._alone(document, tally) for document in _documents(batch)])

    def _alone(self, document: Batch, tally: UnitTally) -> Batch:
        done = self._try(document, tally)
        return tally.reject_where(document, [False], "too_slow") if done is None else done

    def _try(self, batch: Batch, tally: UnitTally) -> Batch | None:
        """The result of the step, or None when it took too long; then nothing is counted."""
        own = UnitTally()
        before = signal.signal(signal.SIGPROF, _stop)
        try:
            signal.setitimer(signal.ITIMER_PROF, self._seconds)
            try:
                done = self._step(batch, own)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _OverTheLimit:
            return None
        finally:
            signal.signal(signal.SIGPROF, before)
        tally.counts.update(own.counts)
        tally.languages.update(own.languages)
        tally.rejects += own.rejects
        return done


def _stop(number: int, frame: FrameType | None) -> None:
    raise _OverTheLimit


def _documents(batch: Batch) -> Iterator[Batch]:
    for index, (text, place) in enumerate(zip(batch.texts, batch.places, strict=True)):
        metadata = None if batch.metadata is None else [batch.metadata[index]]
        yield replace(batch, texts=[text], places=[place], metadata=metadata)


def _joined(batch: Batch, parts: list[Batch]) -> Batch:
    metadata = None if batch.metadata is None else [entry for part in parts for entry in part.metadata or []]
    texts = [text for part in parts for text in part.texts]
    places = [place for part in parts for place in part.places]
    return replace(batch, texts=texts, places=places, metadata=metadata)
