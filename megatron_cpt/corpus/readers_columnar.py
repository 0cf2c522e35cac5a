"""Parquet: row groups are the ranges that workers share, and record batches bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.sources import Unit
from megatron_cpt.errors import DataError

ROWS_PER_BATCH = 1024


def row_group_ranges(path: str, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first row group, one past the last, compressed bytes) of about `unit_bytes` uncompressed each."""
    metadata = _open(path).metadata
    start, uncompressed, compressed = 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        uncompressed += group.total_byte_size
        compressed += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if uncompressed >= unit_bytes or index == metadata.num_row_groups - 1:
            yield start, index + 1, compressed
            start, uncompressed, compressed = index + 1, 0, 0


def read_parquet(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a range of row groups. Places are rows counted from the start of the unit."""
    path = unit.paths[0]
    file = _open(path)
    names = file.schema_arrow.names
    if unit.text_key not in names:
        raise DataError(f"{path} has no column {unit.text_key!r}", hint=f"its columns: {', '.join(names)}")
    column = file.schema_arrow.field(unit.text_key).type
    if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise DataError(f"{path}: column {unit.text_key!r} is {column}, not text", hint="choose another column")
    groups = list(range(unit.start, unit.stop))
    try:
        for rows in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=[unit.text_key]):
            yield column_batch(path, rows.column(0), ledger, max_document_bytes)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}", hint="copy it again") from error


def column_batch(path: str, column: Any, ledger: Ledger, max_document_bytes: int) -> Batch:
    """One batch from a column of strings; null and over-long values are rejects."""
    values: list[Any] = column.to_pylist()
    first = ledger.lines_read + 1
    ledger.lines_read += len(values)
    ledger.documents_read += len(values)
    batch = Batch(path, [], [])
    for place, value in enumerate(values, first):
        if not isinstance(value, str):
            ledger.reject(path, place, "text_not_a_string", "null")
        elif len(value) > max_document_bytes:
            ledger.reject(path, place, "document_too_long", f"more than {max_document_bytes:,} characters")
        else:
            batch.texts.append(value)
            batch.places.append(place)
    return batch


def _open(path: str) -> Any:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint="check the path") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not readable parquet: {error}", hint="copy it again; a cut file has no footer"
        ) from error
