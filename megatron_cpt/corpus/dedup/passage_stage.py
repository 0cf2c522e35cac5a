"""Repeated passages over the whole corpus, in three stages with files between them in the staging folder.

    map      a unit is read, cleaned and filtered once; its documents wait as text, its passages as sorted keys
    join     for a range of keys over all units: which passages are in enough documents, and which unit has the first
    remove   each unit's waiting documents lose what is repeated and go on to the tokenizer

    000012.cleaned.jsonl         documents after cleaning and filters, a batch per line; deleted when tokenised
    000012.passages-0000.npy     u64[2, keys]: sorted keys and the number of documents that hold each; several batches
    000012.cleaned.json          the tally and the number of sorted batches; renamed into place last
    repeated-0003.npy            u64: repeated keys of one range, by unit and key, with the bit FIRST
    repeated-0003.units.npy      i64[units + 1]: where each unit's keys begin in it
    repeated.json                the number of ranges and the units; written when all are there

Memory: a sorted batch holds BATCH_KEYS keys, a range KEYS_PER_BUCKET; removal holds the repeated keys of one unit.
The result depends only on the documents and their order, not on workers, shards, batches or ranges.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_cpt.corpus.arrays import Array, save_array
from megatron_cpt.corpus.dedup.passages import FIRST, PassageRemover, cut_texts, documents_per_key
from megatron_cpt.corpus.documents import Batch, Reject, UnitTally
from megatron_cpt.corpus.schema_processing import Passages
from megatron_cpt.corpus.workers import run_units
from megatron_cpt.durable import durable_file, flush_to_disk, sync

BATCH_KEYS = 1 << 20
KEYS_PER_BUCKET = 2 << 20


class CleanedWriter:
    """The map stage of one unit: keeps its documents as text and its passages as sorted batches of keys."""

    def __init__(self, folder: Path, unit: str, rule: Passages) -> None:
        self._folder, self._unit, self._rule = folder, unit, rule
        self._partial = Path(f"{_text_path(folder, unit)}.{os.getpid()}")
        self._file = self._partial.open("wb")
        self._keys: list[Array] = []
        self._counts: list[Array] = []
        self._waiting = self._batches = 0

    def add(self, batch: Batch) -> None:
        fields = {"path": batch.path, "texts": batch.texts, "places": batch.places, "metadata": batch.metadata}
        self._file.write(orjson.dumps(fields) + b"\n")
        keys, counts = documents_per_key(cut_texts(batch.texts, self._rule))
        self._keys.append(keys)
        self._counts.append(counts)
        self._waiting += len(keys)
        if self._waiting >= BATCH_KEYS:
            self._save_sorted_batch()

    def commit(self, tally: UnitTally) -> None:
        """Everything under its final name, the record last."""
        self._save_sorted_batch()
        flush_to_disk(self._file)
        self._file.close()
        self._partial.replace(_text_path(self._folder, self._unit))
        fields = {item.name: getattr(tally, item.name) for item in dataclass_fields(tally)}
        fields["rejects"] = [asdict(reject) for reject in tally.rejects]
        record = json.dumps({"sorted_batches": self._batches, "tally": fields})
        _replace(_record_path(self._folder, self._unit), record.encode())

    def _save_sorted_batch(self) -> None:
        if self._waiting:
            keys, place = np.unique(np.concatenate(self._keys), return_inverse=True)
            counts = np.bincount(place, weights=np.concatenate(self._counts)).astype(np.uint64)
            save_array(_batch_path(self._folder, self._unit, self._batches), np.stack((keys, counts)))
            self._batches += 1
        self._keys, self._counts, self._waiting = [], [], 0


def is_cleaned(folder: Path, unit: str, is_tokenised: bool) -> bool:
    """True when the map stage of a unit need not run (again)."""
    return _record_path(folder, unit).exists() and (is_tokenised or _text_path(folder, unit).exists())


def read_cleaned_tally(folder: Path, unit: str) -> UnitTally:
    """The tally of a unit after the map stage."""
    fields = _read_record(folder, unit)["tally"]
    counters = {name: Counter(fields[name]) for name in ("counts", "languages", "metadata_found", "notes")}
    return UnitTally(**fields | counters | {"rejects": [Reject(**reject) for reject in fields["rejects"]]})


def documents_without_repeats(folder: Path, unit: str, rule: Passages, tally: UnitTally) -> Iterator[Batch]:
    """The remove stage: a unit's waiting documents, batch by batch, without what is repeated."""
    remove = PassageRemover(rule, _repeated_keys(folder, unit))
    with _text_path(folder, unit).open("rb") as file:
        for line in file:
            yield remove(Batch(**orjson.loads(line)), tally)


def forget_cleaned(folder: Path, unit: str) -> None:
    """Free the disk of a unit's text; its keys stay for a join that may still be needed."""
    _text_path(folder, unit).unlink(missing_ok=True)


def find_repeated(folder: Path, units: Sequence[str], rule: Passages, workers: int) -> None:
    """The join stage, when all `units` (in input order) are mapped; ranges finished by an earlier run are skipped."""
    if _ranges_path(folder).exists():
        return
    batches = [(unit, number) for unit in units for number in range(_read_record(folder, unit)["sorted_batches"])]
    position = {unit: index for index, unit in enumerate(units)}
    total = sum(_load(_batch_path(folder, *batch)).shape[1] for batch in batches)
    count = max(-(-total // KEYS_PER_BUCKET), 1)
    join = partial(_join_range, folder, batches, position, rule.min_documents, count)
    begin = os.getpid() % count  # shards may join at the same time: from different ends, they share the work
    list(run_units(join, [(begin + i) % count for i in range(count)], workers))
    _replace(_ranges_path(folder), json.dumps({"ranges": count, "units": list(units)}).encode())


def _join_range(
    folder: Path,
    batches: Sequence[tuple[str, int]],
    position: dict[str, int],
    min_documents: int,
    count: int,
    number: int,
) -> None:
    """Leave the repeated keys of one range, by unit."""
    if _offsets_path(folder, number).exists():
        return
    keys, documents, owners = _read_range(
        folder, batches, position, (number << 64) // count, (number + 1 << 64) // count
    )
    order = np.lexsort((owners, keys))
    keys, documents, owners = keys[order], documents[order], owners[order]
    begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.append(begins, len(keys)))
    often = np.add.reduceat(documents, begins) >= min_documents if len(keys) else np.empty(0, bool)
    stored = keys | np.where(owners == np.repeat(owners[begins], sizes), FIRST, np.uint64(0))
    wanted = np.repeat(often, sizes)
    wanted[1:] &= (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])  # a unit of several batches
    stored, owners = stored[wanted], owners[wanted]
    order = np.argsort(owners, kind="stable")
    save_array(_repeated_path(folder, number), stored[order])
    save_array(_offsets_path(folder, number), np.searchsorted(owners[order], np.arange(len(position) + 1)))


def _read_range(
    folder: Path, batches: Sequence[tuple[str, int]], position: dict[str, int], low: int, high: int
) -> tuple[Array, Array, Array]:
    """(keys, documents, unit's position) of all batches with low <= key < high."""
    keys, documents, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for unit, number in batches:
        rows = _load(_batch_path(folder, unit, number))
        first = int(np.searchsorted(rows[0], np.uint64(low)))
        last = rows.shape[1] if high >= 1 << 64 else int(np.searchsorted(rows[0], np.uint64(high)))
        keys.append(np.array(rows[0, first:last]))
        documents.append(np.array(rows[1, first:last]))
        owners.append(np.full(last - first, position[unit]))
    return np.concatenate(keys), np.concatenate(documents), np.concatenate(owners)


def _repeated_keys(folder: Path, unit: str) -> Array:
    """The repeated keys that occur in a unit, ascending, each with its bit FIRST."""
    joined = _joined_ranges(folder, _ranges_path(folder).stat().st_mtime_ns)
    position, found = joined.position[unit], []
    for number in range(joined.count):
        begin, end = _load(_offsets_path(folder, number))[position : position + 2].tolist()
        found.append(np.array(_load(_repeated_path(folder, number))[begin:end]))
    return np.concatenate(found)


@dataclass(frozen=True)
class _JoinedRanges:
    """What the join stage left: how many ranges of keys, and where each unit stands in them."""

    count: int
    position: dict[str, int]


@lru_cache(maxsize=1)
def _joined_ranges(folder: Path, changed_at: int) -> _JoinedRanges:
    """Read once per process: reading it for every unit would grow with the square of their number."""
    joined = json.loads(_ranges_path(folder).read_bytes())
    return _JoinedRanges(joined["ranges"], {unit: index for index, unit in enumerate(joined["units"])})


def _text_path(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.cleaned.jsonl"


def _record_path(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.cleaned.json"


def _batch_path(folder: Path, unit: str, number: int) -> Path:
    return folder / f"{unit}.passages-{number:04d}.npy"


def _repeated_path(folder: Path, number: int) -> Path:
    return folder / f"repeated-{number:04d}.npy"


def _offsets_path(folder: Path, number: int) -> Path:
    return folder / f"repeated-{number:04d}.units.npy"


def _ranges_path(folder: Path) -> Path:
    return folder / "repeated.json"


def _read_record(folder: Path, unit: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(_record_path(folder, unit).read_bytes())
    return record


def _replace(path: Path, data: bytes) -> None:
    sync(path.parent)
    with durable_file(path) as file:
        file.write(data)


def _load(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r")
    return array
