"""Rejected documents made known: absolute places, examples in messages, the rejects file, the threshold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.documents import BAD_INPUT_REASONS
from megatron_cpt.corpus.readers.units import Unit
from megatron_cpt.corpus.run.parts import Array, UnitRecord, metadata_path, rejects_path
from megatron_cpt.durable import flush_to_disk
from megatron_cpt.errors import DataError

EXAMPLES_SHOWN = 3


def count_rejects(records: Sequence[UnitRecord]) -> dict[str, int]:
    """Reason -> documents, over all units, most frequent first."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.reject_counts)
    return dict(total.most_common())


def absolute_rejects(staging: Path, units: Sequence[Unit], records: Sequence[UnitRecord]) -> Iterator[dict[str, Any]]:
    """Every reject in input order, its line counted from the start of the file."""
    for unit, lines in _with_lines_before(units, records):
        for reject in _json_lines(rejects_path(staging, unit.index)):
            yield reject | {"line": reject["line"] + lines}


def absolute_metadata(
    staging: Path,
    units: Sequence[Unit],
    records: Sequence[UnitRecord],
    split: str,
    keep: Mapping[tuple[int, str], Array],
) -> Iterator[dict[str, Any]]:
    """Source, file, line and the kept keys of every document of a split, in the order of the dataset."""
    for unit, lines in _with_lines_before(units, records):
        wanted = keep.get((unit.index, split))
        for index, entry in enumerate(_json_lines(metadata_path(staging, unit.index, split))):
            if wanted is not None and not wanted[index]:
                continue
            yield {"source": unit.source} | entry | {"line": entry["line"] + lines}


def lines_before(units: Sequence[Unit], records: Sequence[UnitRecord]) -> list[int]:
    """For each unit the number of lines of its file that earlier units hold."""
    seen: Counter[tuple[str, str]] = Counter()
    counts = []
    for unit, record in zip(units, records, strict=True):
        key = (unit.source, unit.paths[0])
        counts.append(seen[key])
        seen[key] += record.lines_read
    return counts


def _with_lines_before(units: Sequence[Unit], records: Sequence[UnitRecord]) -> Iterator[tuple[Unit, int]]:
    return zip(units, lines_before(units, records), strict=True)


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


def check_bad_input(
    counts: dict[str, int], documents_read: int, max_ratio: float, examples: Iterator[dict[str, Any]]
) -> None:
    """Raise DataError when more documents were unreadable than `max_ratio` allows, naming the first ones."""
    bad = {reason: n for reason, n in counts.items() if reason in BAD_INPUT_REASONS}
    total = sum(bad.values())
    if total <= max_ratio * documents_read:
        return
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in bad.items())
    shown = [r for _, r in zip(range(10_000), examples, strict=False) if r["reason"] in BAD_INPUT_REASONS]
    lines = [f"  {r['file']}:{r['line']}: {r['reason']}: {r['detail']}" for r in shown[:EXAMPLES_SHOWN]]
    hint = "mend the input, or accept the loss with --max-reject-ratio"
    if bad.get("missing_key", 0) == total:
        hint = "name the key that holds the text: --json-key KEY (`text:` of the source in corpus.yaml)"
    if bad.get("not_an_object", 0) == total:
        hint = "each line must be one JSON object; a file that is one array: jq -c '.[]' FILE > FILE.jsonl"
    raise DataError(
        f"{total:,} of {documents_read:,} documents cannot be read ({reasons}), more than the allowed "
        f"{max_ratio:.3%}; nothing was written\n" + "\n".join(lines),
        hint=hint,
    )
