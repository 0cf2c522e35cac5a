"""Parquet and Arrow: row groups are the ranges that workers share, and record batches bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.arrow import pa, pq
from megatron_cpt.corpus.readers.arrow_ipc import open_arrow
from megatron_cpt.corpus.readers.parquet_footer import row_groups
from megatron_cpt.corpus.readers.records import add_record, empty_batch, text_field
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.readers.unreadable import unreadable_file
from megatron_cpt.errors import DataError

ROWS_PER_BATCH = 1024


def row_group_ranges(path: str, unit_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row group, one past the last, compressed and uncompressed bytes), each of about `unit_bytes` or one."""
    _open(path)
    groups = row_groups(path)
    start, uncompressed, compressed = 0, 0, 0
    for index, group in enumerate(groups):
        uncompressed += group.uncompressed_bytes
        compressed += group.compressed_bytes
        if uncompressed >= unit_bytes or index == len(groups) - 1:
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
    is_parquet = unit.format == "parquet" and not unit.data
    try:
        for rows, done in _parquet_rows(unit, path) if is_parquet else _arrow_rows(unit, path):
            _check_bounds(rows)
            yield rows, done
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable_file(path, error) from error
        raise DataError(f"{path} is damaged: {error}", hint="copy it again") from error


_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _check_bounds(rows: Any) -> None:
    """Raise ArrowInvalid when offsets point outside the data, which Arrow trusts. Text may be no UTF-8 here."""
    rows.validate()
    for column in rows.columns:
        as_bytes = _AS_BYTES.get(column.type)
        (column if as_bytes is None else column.view(as_bytes)).validate(full=True)


def _parquet_rows(unit: Unit, path: str) -> Iterator[tuple[Any, float]]:
    file = _open(path)
    columns = wanted_columns(unit, path, file.schema_arrow)
    described = row_groups(path)
    groups = list(range(unit.start, len(described) if unit.stop is None else unit.stop))
    total, done = sum(described[group].rows for group in groups), 0
    for rows in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=columns, use_threads=False):
        done += rows.num_rows
        yield rows, done / max(total, 1)
    if done != total:
        raise DataError(f"{path} is damaged: {done:,} rows where its footer says {total:,}", hint="copy it again")


def _arrow_rows(unit: Unit, path: str) -> Iterator[tuple[Any, float]]:
    """Record batches of an Arrow file, also of one that datasets.save_to_disk wrote."""
    with open_arrow(unit.data or path) as (schema, batches):
        columns = wanted_columns(unit, path, schema)
        for rows, done in batches:
            yield rows.select(columns), done


def wanted_columns(unit: Unit, path: str, schema: Any) -> list[str]:
    """The columns that hold the keys of a source, sorted. Raises DataError for one that is missing, double or no text.

    A key of `metadata` that has no column is left out; the run says so when no file has it.
    """
    field = text_field(unit.text_field)
    columns = {_column_of(key, schema) for key in field.keys}
    if missing := sorted(name for name in columns if name not in schema.names):
        raise DataError(
            f"{path} has no column {missing[0]!r}",
            hint=f"its columns: {', '.join(schema.names)}; name the text's with --json-key (`text:` of the source)",
        )
    columns |= {name for key in unit.metadata if (name := _column_of(key, schema)) in schema.names}
    if double := sorted(name for name in columns if schema.names.count(name) > 1):
        raise DataError(f"{path} has two columns {double[0]!r}", hint="rename or drop one of them")
    if field.simple and field.field in schema.names and not _holds_text(schema.field(field.field).type):
        kind = schema.field(field.field).type
        raise DataError(f"{path}: column {field.field!r} is {kind}, not text", hint="choose another column")
    return sorted(columns)


def _column_of(key: str, schema: Any) -> str:
    """A dotted key is a column of that name, or a path into a column of structs."""
    return key if key in schema.names else key.split(".")[0]


def _holds_text(kind: Any) -> bool:
    """Strings of any layout, bytes (which may be UTF-8), and a column of nothing but nulls."""
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in checks)


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
            record = _record(rows, place - first)
        except UnicodeDecodeError as error:
            tally.reject(path, place, "invalid_utf8", str(error))
            continue
        add_record(batch, unit, record, place, tally)
    too_long = [len(text) > max_document_bytes for text in batch.texts]
    if any(too_long):
        return tally.reject_where(batch, [not long for long in too_long], "document_too_long")
    return batch


def _record(rows: Any, index: int) -> dict[str, Any]:
    """One row as Python values."""
    return {name: _value(column[index]) for name, column in zip(rows.schema.names, rows.columns, strict=True)}


def _value(value: Any) -> Any:
    """A scalar of Arrow in Python; what Python has no type for, such as nanoseconds or the year 10000, becomes text."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise
    # An unknown time zone is a LookupError of whichever library of zones Arrow finds.
    except (ValueError, OverflowError, LookupError, ImportError):
        if isinstance(value, pa.StructScalar):
            return {name: _value(item) for name, item in value.items()}
        if isinstance(value, (pa.ListScalar, pa.MapScalar)):
            return [_value(item) for item in value.values]
        return _text_of(value)


def _text_of(value: Any) -> str:
    try:
        return str(value.cast(pa.string()).as_py())
    except pa.ArrowException:
        number = value.value if hasattr(value, "value") else value
        return f"{number} ({value.type})"


def _values(column: Any) -> list[Any] | None:
    """The column as Python values, or None when one of them is not UTF-8 (Parquet does not promise it)."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return None


def _open(path: str) -> Any:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable_file(path, error) from error
        raise DataError(
            f"{path} is not readable parquet: {error}", hint="copy it again; a cut file has no footer"
        ) from error
