"""The map stage: hand units, and the pieces of streams, to the workers; units that an earlier run did are skipped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_cpt.corpus.readers.sample import EARLY_BAD_RATIO
from megatron_cpt.corpus.readers.streams import read_pieces, units_of
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.readers.unreadable import bad_input
from megatron_cpt.corpus.run.corpus_run import CorpusRun, OnUnit
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.corpus.run.rejects import check_rejects
from megatron_cpt.corpus.workers import run_units

log = logging.getLogger(__name__)

# A run that reads nothing but garbage stops after this many documents instead of at the end of the corpus.
EARLY_CHECK_DOCUMENTS = 1_000


@dataclass(frozen=True)
class UnitStage:
    """What is done to each unit, and how to know that an earlier run did it."""

    name: str
    work: Callable[[CorpusRun, Unit], UnitRecord]
    finished: Callable[[CorpusRun, Unit], UnitRecord | None]
    reads_input: bool  # pieces come from their streams, not from what an earlier stage left


def map_units(run: CorpusRun, stage: UnitStage) -> FinishedUnits:
    """Take all units of the run's shard through a stage. Raises DataError early for input that is mostly unreadable."""
    records: dict[str, UnitRecord] = {}
    items: list[Unit] = []
    streams: list[Unit] = []
    for planned in run.planned:
        found = units_of(planned, run.staging)
        own = [unit for unit in found or () if run.takes(unit)]
        missing = []
        for unit in own:
            if (record := stage.finished(run, unit)) is not None:
                records[unit.name] = record
            else:
                missing.append(unit)
        if not (planned.is_stream and stage.reads_input):
            items += missing
        elif run.reads(planned) and (found is None or missing):
            streams.append(planned)
    _do_missing(run, stage, records, items, streams)
    units = run.units_in_order()
    assert units is not None
    return FinishedUnits(units, [records[unit.name] for unit in units])


def _do_missing(
    run: CorpusRun, stage: UnitStage, records: dict[str, UnitRecord], items: Sequence[Unit], streams: Sequence[Unit]
) -> None:
    """Add the records of `items` and of the pieces of `streams` to `records`."""
    if records:
        log.info("continuing: %d units are done", len(records))
    on_unit = _progress(run, stage) if items or streams else lambda record: None
    for record in records.values():
        on_unit(record)
    readers = [
        partial(
            read_pieces, stream, run.staging, run.takes, lambda piece: stage.finished(run, piece) is not None,
            run.corpus.max_document_bytes,
        )
        for stream in streams
    ]  # fmt: skip
    check = _EarlyCheck(run)
    for unit, record in run_units(partial(_do, run, stage), items, run.workers, readers):
        if record.unit not in records:
            records[record.unit] = record
            on_unit(record)
            check.add(unit, record)


def _do(run: CorpusRun, stage: UnitStage, unit: Unit) -> tuple[Unit, UnitRecord]:
    """A piece comes without a file when an earlier run did it."""
    if unit.piece is not None and stage.reads_input and not unit.data:
        record = stage.finished(run, unit)
        assert record is not None
        return unit, record
    return unit, stage.work(run, unit)


def _progress(run: CorpusRun, stage: UnitStage) -> OnUnit:
    if run.start_progress is None:
        return lambda record: None
    return run.start_progress(run.stage(stage.name), sum(unit.size_bytes for unit in run.planned))


class _EarlyCheck:
    """Stops a run soon when most documents of a source are unreadable: a wrong key should not cost hours.

    It keeps sums, so that a record costs the same however many there are.
    """

    def __init__(self, run: CorpusRun) -> None:
        self._run = run
        self._max_ratio = max(EARLY_BAD_RATIO, run.corpus.max_reject_ratio)
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._done: list[tuple[Unit, UnitRecord]] = []

    def add(self, unit: Unit, record: UnitRecord) -> None:
        self._done.append((unit, record))
        source = record.source
        self._read[source] += record.documents_read
        self._bad[source] += sum(bad_input(record.reject_counts).values())
        if self._read[source] >= EARLY_CHECK_DOCUMENTS and self._bad[source] > self._max_ratio * self._read[source]:
            own = [pair for pair in self._done if pair[0].source == source]
            own.sort(key=lambda pair: (pair[0].number, pair[0].piece or 0))
            units, records = zip(*own, strict=True)
            check_rejects(self._run.staging, FinishedUnits(units, records), self._max_ratio, f" of source {source!r}")
