"""Rejected documents made known: absolute places, examples in messages, the rejects file, the threshold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import BAD_INPUT_REASONS
from megatron_cpt.corpus.readers.unreadable import bad_input, unreadable_error
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.parts import metadata_path, rejects_path
from megatron_cpt.durable import flush_to_disk

EXAMPLES_SHOWN = 3
# Rejects looked at for examples: enough to pass over those of filters.
REJECTS_SEARCHED = 10_000


def absolute_rejects(staging: Path, done: FinishedUnits) -> Iterator[dict[str, Any]]:
    """Every reject in input order, its line counted from the start of the file."""
    for unit, lines in zip(done.units, done.lines_before, strict=True):
        for reject in _json_lines(rejects_path(staging, unit.name)):
            yield reject | {"line": reject["line"] + lines}


def absolute_metadata(
    staging: Path, done: FinishedUnits, split: str, keep: Mapping[tuple[str, str], Array]
) -> Iterator[dict[str, Any]]:
    """Number, source, file, line and the kept keys of every document of a split, in the order of the dataset."""
    document = 0
    for unit, lines in zip(done.units, done.lines_before, strict=True):
        wanted = keep.get((unit.name, split))
        for index, entry in enumerate(_json_lines(metadata_path(staging, unit.name, split))):
            if wanted is not None and not wanted[index]:
                continue
            yield {"document": document, "source": unit.source} | entry | {"line": entry["line"] + lines}
            document += 1


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def write_json_lines(path: Path, entries: Iterator[dict[str, Any]]) -> None:
    """Write one JSON object per line; without any, no file (and an old one is removed)."""
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("wb") as file:
        for count, entry in enumerate(entries, 1):  # noqa: B007
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        flush_to_disk(file)
    if count:
        partial.replace(path)
    else:
        partial.unlink()
        path.unlink(missing_ok=True)


def source_warnings(sources: Iterable[str], done: FinishedUnits, max_ratio: float) -> Iterator[str]:
    """What the sums over a whole corpus hide: a source that gives nothing, or that cannot be read in a larger part."""
    read, written = Counter[str](), Counter[str]()
    rejects: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for record in done.records:
        read[record.source] += record.documents_read
        written[record.source] += sum(part.documents for part in record.parts.values())
        rejects[record.source].update(record.reject_counts)
    for name, counts in rejects.items():
        bad = bad_input(counts)
        if sum(bad.values()) > max_ratio * read[name]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
            yield f"source {name!r}: {sum(bad.values()):,} of its {read[name]:,} documents cannot be read ({reasons})"
        if not written[name]:
            yield f"source {name!r} gives nothing: {read[name]:,} documents read, none kept"


def check_rejects(staging: Path, done: FinishedUnits, max_ratio: float, of_what: str = "") -> None:
    """Raise DataError when more documents were unreadable than `max_ratio` allows, naming the first ones."""
    if sum(bad_input(done.reject_counts).values()) <= max_ratio * done.documents_read:
        return
    found = zip(range(REJECTS_SEARCHED), absolute_rejects(staging, done), strict=False)
    shown = [reject for _, reject in found if reject["reason"] in BAD_INPUT_REASONS][:EXAMPLES_SHOWN]
    examples = [f"{r['file']}:{r['line']}: {r['reason']}: {r['detail']}" for r in shown]
    raise unreadable_error(of_what, done.reject_counts, done.documents_read, max_ratio, examples)
