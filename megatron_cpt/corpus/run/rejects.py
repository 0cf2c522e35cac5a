"""Rejected documents made known: absolute places, examples in messages, the rejects file, the threshold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import BAD_INPUT_REASONS
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.parts import metadata_path, rejects_path
from megatron_cpt.durable import flush_to_disk
from megatron_cpt.errors import DataError

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
    """Source, file, line and the kept keys of every document of a split, in the order of the dataset."""
    for unit, lines in zip(done.units, done.lines_before, strict=True):
        wanted = keep.get((unit.name, split))
        for index, entry in enumerate(_json_lines(metadata_path(staging, unit.name, split))):
            if wanted is not None and not wanted[index]:
                continue
            yield {"source": unit.source} | entry | {"line": entry["line"] + lines}


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


def check_rejects(staging: Path, done: FinishedUnits, max_ratio: float) -> None:
    """Raise DataError when more documents were unreadable than `max_ratio` allows, naming the first ones."""
    bad = {reason: n for reason, n in done.reject_counts.items() if reason in BAD_INPUT_REASONS}
    total = sum(bad.values())
    if total <= max_ratio * done.documents_read:
        return
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in bad.items())
    found = zip(range(REJECTS_SEARCHED), absolute_rejects(staging, done), strict=False)
    shown = [reject for _, reject in found if reject["reason"] in BAD_INPUT_REASONS][:EXAMPLES_SHOWN]
    lines = [f"  {r['file']}:{r['line']}: {r['reason']}: {r['detail']}" for r in shown]
    raise DataError(
        f"{total:,} of {done.documents_read:,} documents cannot be read ({reasons}), more than the allowed "
        f"{max_ratio:.3%}; nothing was written\n" + "\n".join(lines),
        hint=_hint(bad, total),
    )


def _hint(bad: Mapping[str, int], total: int) -> str:
    if bad.get("missing_key", 0) == total:
        return "name the key that holds the text: --json-key KEY (`text:` of the source in corpus.yaml)"
    if bad.get("not_an_object", 0) == total:
        return "each line must be one JSON object; a file that is one array: jq -c '.[]' FILE > FILE.jsonl"
    return "fix the input, or accept the loss with --max-reject-ratio"
