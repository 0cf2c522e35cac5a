"""Parts: what a worker leaves for one unit, so that a killed run continues and shards run anywhere.

For unit 12 the staging folder holds `000012.SPLIT.part` per split and then `000012.json`, renamed into place
last: a unit is done when its .json is there. All that the record counts on is on the disk before the record has its
name, so a loss of power costs at most the units in work. A part is the ids (in the dataset's dtype), then the sequence
lengths (i32), then the number of sequences of each document (i32); the .json holds the counts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import Batch, DocumentCounts, Encoded, UnitTally
from megatron_cpt.corpus.readers.metadata import json_value
from megatron_cpt.corpus.schema import field_name
from megatron_cpt.durable import durable_file, flush_to_disk, sync


@dataclass(frozen=True)
class UnitRecord:
    """The committed result of a unit."""

    unit: str  # its name
    source: str
    size_bytes: int
    documents_read: int
    lines_read: int
    parts: dict[str, DocumentCounts]
    reject_counts: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    metadata_found: dict[str, int] = field(default_factory=dict)  # documents that have each key of `metadata`
    notes: dict[str, int] = field(default_factory=dict)  # documents kept of which something is to be said
    passages_removed: int = 0
    passage_chars_removed: int = 0
    passage_examples: list[str] = field(default_factory=list)


class PartWriter:
    """Streams the documents of one unit and split to disk; only the lengths stay in memory."""

    def __init__(self, folder: Path, unit: str, split: str, dtype: str, with_metadata: bool) -> None:
        self._final = part_path(folder, unit, split)
        # named by process: a worker that outlives its killed parent must not touch the next run's part
        self._path = self._final.with_name(f"{self._final.name}.{os.getpid()}")
        self._file: BinaryIO = self._path.open("wb")
        self._dtype = np.dtype(dtype)
        self._lengths: list[Array] = []
        self._sequences: list[Array] = []
        self._tokens = 0
        self._metadata = metadata_path(folder, unit, split).open("wb") if with_metadata else None

    def write(self, encoded: Encoded, batch: Batch) -> None:
        """Append the documents of `batch`, already encoded."""
        self._file.write(encoded.ids.astype(self._dtype, copy=False).data)
        self._lengths.append(encoded.sequence_lengths.astype(np.int32))
        self._sequences.append(encoded.sequences_per_document.astype(np.int32))
        self._tokens += len(encoded.ids)
        if self._metadata is not None:
            path = json_value(batch.path)  # a name on the disk need not be UTF-8
            for place, metadata in zip(batch.places, batch.metadata or repeat({}), strict=False):
                kept = {field_name(key): value for key, value in metadata.items()}
                self._metadata.write(orjson.dumps({"file": path, "line": place, **kept}) + b"\n")

    def close(self) -> DocumentCounts:
        for pieces in (self._lengths, self._sequences):
            for piece in pieces:
                self._file.write(piece.tobytes())
        flush_to_disk(self._file)
        self._file.close()
        self._path.replace(self._final)
        if self._metadata is not None:
            flush_to_disk(self._metadata)
            self._metadata.close()
        documents = sum(map(len, self._sequences))
        return DocumentCounts(documents, sum(map(len, self._lengths)), self._tokens)


def part_path(folder: Path, unit: str, split: str) -> Path:
    return folder / f"{unit}.{split}.part"


def metadata_path(folder: Path, unit: str, split: str) -> Path:
    return folder / f"{unit}.{split}.documents.jsonl"


def record_path(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.json"


def rejects_path(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.rejects.jsonl"


def commit_unit(folder: Path, record: UnitRecord, tally: UnitTally) -> None:
    """Leave the rejects and, last, the record that makes the unit done."""
    write_rejects(folder, record, tally)
    sync(folder)
    with durable_file(record_path(folder, record.unit)) as file:
        file.write(json.dumps(asdict(record)).encode())


def write_rejects(folder: Path, record: UnitRecord, tally: UnitTally) -> None:
    """Leave a unit's rejects in input order; without any, no file."""
    if rejects := sorted(tally.rejects, key=lambda reject: (reject.path, reject.place)):
        lines = [json.dumps(_reject_fields(record.source, r), ensure_ascii=False) for r in rejects]
        text = "\n".join(lines) + "\n"
        with durable_file(rejects_path(folder, record.unit)) as file:
            file.write(text.encode(errors="backslashreplace"))


def _reject_fields(source: str, reject: Any) -> dict[str, Any]:
    return {
        "source": source,
        "file": json_value(reject.path),
        "line": reject.place,
        "reason": reject.reason,
        "detail": reject.detail,
    }


def read_record(folder: Path, unit: str) -> UnitRecord | None:
    """The record of a done unit whose parts have the size it states, else None."""
    path = record_path(folder, unit)
    try:
        raw = json.loads(path.read_bytes())
        raw["parts"] = {split: DocumentCounts(**counts) for split, counts in raw["parts"].items()}
        return UnitRecord(**raw)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_part(folder: Path, unit: str, split: str, counts: DocumentCounts, dtype: str) -> Encoded:
    """The documents of a part, mapped."""
    path = part_path(folder, unit, split)
    if not path.stat().st_size:
        return Encoded(np.empty(0, dtype), np.empty(0, np.int32), np.empty(0, np.int32))
    raw = np.memmap(path, np.uint8, mode="r")
    ids_end = counts.tokens * np.dtype(dtype).itemsize
    lengths_end = ids_end + 4 * counts.sequences
    return Encoded(raw[:ids_end].view(dtype), raw[ids_end:lengths_end].view(np.int32), raw[lengths_end:].view(np.int32))


def part_bytes(counts: DocumentCounts, dtype: str) -> int:
    return counts.tokens * np.dtype(dtype).itemsize + 4 * counts.sequences + 4 * counts.documents


def parts_are_whole(folder: Path, record: UnitRecord, dtype: str) -> bool:
    """True when every part of the record lies there in full size."""

    def size(split: str) -> int:
        path = part_path(folder, record.unit, split)
        return path.stat().st_size if path.exists() else -1

    return all(size(split) == part_bytes(counts, dtype) for split, counts in record.parts.items())
