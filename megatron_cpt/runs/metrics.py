"""metrics.jsonl, read: rows from an offset on, so that looking again at a long run costs only what is new.

Every row has `start`, the number of the attempt (launch) of the run that wrote it. After a crash some steps are done
twice, and the row of the later attempt counts (`latest_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

Row = dict[str, Any]


def read_rows(path: Path, offset: int = 0, most_bytes: int = -1) -> tuple[list[Row], int]:
    """Return the rows behind byte `offset` in the order of the file, and the offset to read on from.

    A last line without its end is still being written: it is left for the next call. Lines that a crash cut short are
    skipped, and a file that has become shorter than `offset` is another one: it is read from its beginning. A file
    that does not exist yet has no rows. At most `most_bytes` are read, or one line if that is longer.
    """
    try:
        with path.open("rb") as file:
            if offset > file.seek(0, 2):
                offset = 0
            file.seek(offset)
            read = file.read(most_bytes)
            whole, newline, _ = read.rpartition(b"\n")
            if not newline and len(read) == most_bytes:
                whole, newline, _ = (read + file.readline()).rpartition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    rows = []
    for line in whole.splitlines():
        try:
            row = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows, offset + len(whole) + len(newline)


def read_rows_in_pieces(path: Path, offset: int = 0, piece_bytes: int = 1 << 20) -> Iterator[tuple[list[Row], int]]:
    """Yield the rows behind byte `offset` as `read_rows` does, a piece of the file at a time.

    Yields:
        rows, and the offset behind them; smaller than the one before where the file is another one.
    """
    while True:
        rows, after = read_rows(path, offset, piece_bytes)
        if after == offset:
            return
        yield rows, after
        offset = after


def last_rows(path: Path, most_bytes: int = 65_536) -> list[Row]:
    """Return the rows at the end of the file, so that a look at a long run does not read all of it."""
    try:
        size = path.stat().st_size
    except OSError:
        return []
    rows, _ = read_rows(path, max(0, size - most_bytes))  # the first line may be cut: it is skipped
    return rows


def finite(value: Any) -> float | None:
    """Return None for what is written as text because JSON has no word for it: NaN and infinity."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def latest_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows in order of iteration; of a step, validation or event that was done twice the later one.

    Of two attempts the later one counts, even where one that was cut off wrote a last row after it.
    """
    latest: dict[tuple[Any, Any, Any], Row] = {}
    for row in rows:
        key = (row.get("event"), row.get("name"), row.get("iteration"))
        if key not in latest or _attempt(row) >= _attempt(latest[key]):
            latest[key] = row
    return sorted(latest.values(), key=lambda row: row.get("iteration") or 0)


def _attempt(row: Row) -> int:
    attempt = row.get("start")
    return attempt if isinstance(attempt, int) else 0


def read_metrics(path: Path) -> list[Row]:
    """All rows of a run that count."""
    return latest_rows(read_rows(path)[0])
