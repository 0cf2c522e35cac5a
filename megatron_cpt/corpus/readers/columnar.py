"""Parquet and Arrow: row groups are the ranges that workers share, and record batches bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.records import FieldError, add_record, empty_batch, text_field
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.errors import DataError

ROWS_PER_BATCH = 1024


def row_group_ranges(path: str, unit_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row group, one past the last, compressed and uncompressed bytes), each of about `unit_bytes` or one."""
    metadata = _open(path).metadata
    start, uncompressed, compressed = 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        uncompressed += group.total_byte_size
        compressed += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if uncompressed >= unit_bytes or index == metadata.num_row_groups - 1:
            yield start, index + 1, compressed, uncompressed
            start, uncompressed, compressed = index + 1, 0, 0


def read_columnar(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a Parquet or Arrow unit. Places are rows, counted from where the unit begins in the file."""
    for path in unit.paths:
        tally.lines_read = 0
        for rows, _ in record_batches(unit, path):
            for start in range(0, rows.num_rows, ROWS_PER_BATCH):
                yield _batch(unit, path, rows.slice(start, ROWS_PER_BATCH), tally, max_document_bytes)


def record_batches(unit: Unit, path: str) -> Iterator[tuple[Any, float]]:
    """Validated record batches of the columns that the source names, and the share of the file read so far."""
    wanted = sorted({key.split(".")[0] for key in (*text_field(unit.text_field).keys, *unit.metadata)})
    is_parquet = unit.format == "parquet" and not unit.data
    try:
        for rows, done in _parquet_rows(unit, path, wanted) if is_parquet else _arrow_rows(unit, path, wanted):
            rows.validate()
            yield rows, done
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}", hint="copy it again") from error


def _parquet_rows(unit: Unit, path: str, columns: list[str]) -> Iterator[tuple[Any, float]]:
    file = _open(path)
    _check_columns(unit, path, file.schema_arrow, columns)
    groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
    total, done = sum(file.metadata.row_group(group).num_rows for group in groups), 0
    for rows in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=columns):
        done += rows.num_rows
        yield rows, done / max(total, 1)


def _arrow_rows(unit: Unit, path: str, columns: list[str]) -> Iterator[tuple[Any, float]]:
    """Record batches of an Arrow file, in the file format or the stream format of datasets.save_to_disk."""
    with pa.memory_map(unit.data or path) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        _check_columns(unit, path, reader.schema, columns)
        for index, rows in enumerate(batches, 1):
            at_end = reader.num_record_batches if hasattr(reader, "num_record_batches") else 0
            yield rows.select(columns), index / at_end if at_end else source.tell() / max(source.size(), 1)


def _check_columns(unit: Unit, path: str, schema: Any, columns: list[str]) -> None:
    if missing := [name for name in columns if name not in schema.names]:
        raise DataError(
            f"{path} has no column {missing[0]!r}",
            hint=f"its columns: {', '.join(schema.names)}; name the text's with --json-key (`text:` of the source)",
        )
    field = text_field(unit.text_field)
    if field.simple and field.field in schema.names:
        column = schema.field(field.field).type
        if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            raise DataError(f"{path}: column {field.field!r} is {column}, not text", hint="choose another column")


def _batch(unit: Unit, path: str, rows: Any, tally: UnitTally, max_document_bytes: int) -> Batch:
    """One batch of documents; null and over-long values are rejects."""
    first = tally.lines_read + 1
    tally.lines_read += rows.num_rows
    tally.documents_read += rows.num_rows
    if text_field(unit.text_field).simple and not unit.metadata and rows.num_columns == 1:
        texts = _values(rows.column(0))
        if texts is not None and all(type(text) is str and len(text) <= max_document_bytes for text in texts):
            return Batch(path, texts, list(range(first, first + len(texts))))
    batch = empty_batch(unit, path)
    for place in range(first, first + rows.num_rows):
        try:
            add_record(batch, unit, rows.slice(place - first, 1).to_pylist()[0], place)
        except UnicodeDecodeError as error:
            tally.reject(path, place, "invalid_utf8", str(error))
        except FieldError as error:
            tally.reject(path, place, error.reason, error.detail)
    too_long = [len(text) > max_document_bytes for text in batch.texts]
    if any(too_long):
        return tally.reject_where(batch, [not long for long in too_long], "document_too_long")
    return batch


def _values(column: Any) -> list[Any] | None:
    """The column as Python values, or None when one of them is not UTF-8 (Parquet does not promise it)."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return None


def _open(path: str) -> Any:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint="check the path") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not readable parquet: {error}", hint="copy it again; a cut file has no footer"
        ) from error
