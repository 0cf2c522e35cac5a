"""The map stage: hand units, and the blocks of streams, to the workers; what a run before finished is not repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from megatron_cpt.corpus.dedup.passage_stage import is_cleaned, read_cleaned_ledger
from megatron_cpt.corpus.readers.blocks import BLOCK_STRIDE, read_blocks, units_of
from megatron_cpt.corpus.readers.units import Unit
from megatron_cpt.corpus.run.parts import UnitRecord, parts_are_whole, read_record
from megatron_cpt.corpus.run.rejects import absolute_rejects, check_bad_input, count_rejects
from megatron_cpt.corpus.run.unit import Job, clean_unit, process_unit, unit_record
from megatron_cpt.corpus.run.workers import run_units

log = logging.getLogger(__name__)

# A run that reads nothing but garbage stops after this many documents instead of at the end of the corpus.
EARLY_CHECK_DOCUMENTS = 1_000
EARLY_BAD_RATIO = 0.5
# A stream larger than this part of a shard's share of the corpus is decoded by all shards, each for its own blocks.
LARGE_PART_OF_SHARE = 0.25

Progress = Callable[[UnitRecord], None]
StartProgress = Callable[[int], Progress]
Done = Callable[[Unit], UnitRecord | None]
UnitFunction = Callable[[Job, Unit], UnitRecord]


@dataclass(frozen=True)
class Work:
    """What one call does: the planned units of its shard, all of them by default."""

    job: Job
    planned: Sequence[Unit]
    workers: int
    start_progress: StartProgress | None = None
    shard: int = 0
    shards: int = 1

    def takes(self, unit: Unit) -> bool:
        """Units are dealt out in turn; so are the blocks of a large stream, those of a small one go to one shard."""
        index, number = unit.index % BLOCK_STRIDE, unit.index // BLOCK_STRIDE
        return (index + number * self._is_shared(index)) % self.shards == self.shard

    def reads(self, stream: Unit) -> bool:
        return self._is_shared(stream.index) or self.takes(stream)

    @cached_property
    def _share_bytes(self) -> float:
        return sum(unit.size_bytes for unit in self.planned) / self.shards

    def _is_shared(self, index: int) -> bool:
        unit = self.planned[index]
        return unit.block_bytes > 0 and unit.size_bytes > self._share_bytes * LARGE_PART_OF_SHARE

    def is_block(self, unit: Unit) -> bool:
        return self.planned[unit.index % BLOCK_STRIDE].block_bytes > 0


def units_in_order(work: Work) -> list[Unit] | None:
    """The units of the work in input order; None while a stream has not been read to its end."""
    units: list[Unit] = []
    for planned in work.planned:
        if not (work.reads(planned) if planned.block_bytes else work.takes(planned)):
            continue
        found = units_of(planned, work.job.staging)
        if found is None:
            return None
        units += filter(work.takes, found)
    return units


def clean_units(work: Work) -> int:
    """The first half of all units, where passages are deduplicated. Returns their number."""
    return len(_map_units(work, clean_unit, partial(_cleaned_record, work.job), reads_input=True))


def process_units(work: Work) -> tuple[list[Unit], list[UnitRecord]]:
    """The parts of all units, with their records, in input order."""
    done = partial(_done_record, work.job)
    found = _map_units(work, process_unit, done, reads_input=work.job.passages is None)
    return [unit for unit, _ in found], [record for _, record in found]


def _done_record(job: Job, unit: Unit) -> UnitRecord | None:
    """The record of a unit whose parts are there in full."""
    record = read_record(job.staging, unit.index)
    return record if record is not None and parts_are_whole(job.staging, record, job.tokenizer.dtype) else None


def _cleaned_record(job: Job, unit: Unit) -> UnitRecord | None:
    if not is_cleaned(job.staging, unit.index, _done_record(job, unit) is not None):
        return None
    return unit_record(unit, read_cleaned_ledger(job.staging, unit.index), {})


def _map_units(work: Work, function: UnitFunction, done: Done, reads_input: bool) -> list[tuple[Unit, UnitRecord]]:
    """Apply `function` to all units that are not done. With `reads_input`, blocks come from their streams."""
    records: dict[int, UnitRecord] = {}
    items: list[Unit] = []
    streams: list[Unit] = []
    for planned in work.planned:
        found = units_of(planned, work.job.staging)
        own = [unit for unit in found or () if work.takes(unit)]
        records |= {unit.index: record for unit in own if (record := done(unit)) is not None}
        missing = [unit for unit in own if unit.index not in records]
        if not (planned.block_bytes and reads_input):
            items += missing
        elif work.reads(planned) and (found is None or missing):
            streams.append(planned)
    _run(work, function, done, records, items, streams)
    units = units_in_order(work)
    assert units is not None
    return [(unit, records[unit.index]) for unit in units]


def _run(
    work: Work, function: UnitFunction, done: Done, records: dict[int, UnitRecord], items: list[Unit],
    streams: list[Unit],
) -> None:  # fmt: skip
    """Add the records of `items` and of the blocks of `streams` to `records`."""
    if records:
        log.info("continuing: %d units are done", len(records))
    start = work.start_progress
    progress = start(sum(u.size_bytes for u in work.planned)) if start and (items or streams) else lambda record: None
    for record in records.values():
        progress(record)
    limit = work.job.corpus.max_document_bytes
    readers = [
        partial(read_blocks, stream, work.job.staging, work.takes, lambda block: done(block) is not None, limit)
        for stream in streams
    ]
    expected = partial(_unless_done, work, function, done) if streams else partial(function, work.job)
    for record in run_units(expected, items, work.workers, readers):
        if record.unit not in records:
            records[record.unit] = record
            progress(record)
            _check_early(work, records)


def _unless_done(work: Work, function: UnitFunction, done: Done, unit: Unit) -> UnitRecord:
    """A block comes without a file when an earlier run did it."""
    record = done(unit) if work.is_block(unit) and not unit.data else None
    return function(work.job, unit) if record is None else record


def _check_early(work: Work, records: dict[int, UnitRecord]) -> None:
    """Stop soon when most documents are unreadable: a wrong key should not cost hours."""
    if sum(record.documents_read for record in records.values()) < EARLY_CHECK_DOCUMENTS:
        return
    order = sorted(records, key=lambda index: (index % BLOCK_STRIDE, index // BLOCK_STRIDE))
    units = [replace(work.planned[index % BLOCK_STRIDE], index=index) for index in order]
    check_rejects(
        work.job, units, [records[index] for index in order],
        max(EARLY_BAD_RATIO, work.job.corpus.max_reject_ratio),
    )  # fmt: skip


def check_rejects(job: Job, units: Sequence[Unit], records: Sequence[UnitRecord], max_ratio: float) -> None:
    """Raises DataError when more documents were unreadable than `max_ratio` allows."""
    read = sum(record.documents_read for record in records)
    check_bad_input(count_rejects(records), read, max_ratio, absolute_rejects(job.staging, units, records))
