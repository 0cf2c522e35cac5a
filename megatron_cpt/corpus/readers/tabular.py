"""csv and tsv: a record per row, its keys in the first row, quoted as spreadsheets quote.

A field may hold line ends, so a file cannot be entered in the middle and is read by one worker. Places are lines.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.compression import open_input
from megatron_cpt.corpus.readers.encoding import iconv_hint, likely_encoding, not_utf8
from megatron_cpt.corpus.readers.records import add_record, empty_batch, text_field
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.errors import DataError

BATCH_CHARS = 4 << 20
_DELIMITERS = {"csv": ",", "tsv": "\t"}
# A field beyond the limit is read up to so many times the limit: within a longer one the parser gives up, and would
# take the lines of its rest for rows.
_READ_LIMITS = 4
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


def read_tabular(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of csv or tsv files. Raises DataError for a file without the keys, or with a quote that never ends."""
    csv.field_size_limit(min(_READ_LIMITS * max_document_bytes, sys.maxsize))
    for path in unit.paths:
        tally.lines_read = 0
        with open_input(path) as file:
            # bytes that are not UTF-8 come through as lone surrogates, and are rejected with their row
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            yield from _read_file(unit, path, text, tally, max_document_bytes)
            text.detach()


def _read_file(
    unit: Unit, path: str, file: io.TextIOWrapper, tally: UnitTally, max_document_bytes: int
) -> Iterator[Batch]:
    rows = csv.reader(file, delimiter=_DELIMITERS[unit.format], strict=True)
    header = _header(unit, path, rows)
    if header is None:
        return
    batch, chars = empty_batch(unit, path), 0
    while True:
        place = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}: a quote that opens in the row at line {place} never closes",
                    hint="close the quote or double it; the rest of the file is inside it",
                ) from error
            if "field larger" in str(error):
                raise DataError(
                    f"{path}: a field in the row at line {place} has more than {csv.field_size_limit():,} characters",
                    hint="close its quote, or raise max_document_bytes",
                ) from error
            tally.documents_read += 1
            tally.reject(path, place, "invalid_csv", str(error))
            continue
        if not row:
            continue
        tally.documents_read += 1
        if max(map(len, row)) > max_document_bytes:
            tally.reject(path, place, "document_too_long", f"a field of more than {max_document_bytes:,} characters")
            continue
        _add_row(batch, unit, header, row, place, tally)
        chars += sum(map(len, row))
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = empty_batch(unit, path), 0
    yield batch


def _header(unit: Unit, path: str, rows: Iterator[list[str]]) -> list[str] | None:
    """The names in the first row; None for an empty file."""
    try:
        header = next(rows, None)
    except csv.Error as error:
        raise DataError(
            f"{path}: its first row is not {unit.format}: {error}",
            hint="the first row names the columns; a quote in it must close",
        ) from error
    if header is None:
        return None
    data = "\n".join(header).encode("utf-8", "surrogateescape")
    if guess := likely_encoding(data):
        raise DataError(f"{path} is not UTF-8; it looks like {guess}", hint=iconv_hint(guess))
    wanted = text_field(unit.text_field).keys
    if missing := [key for key in wanted if key not in header]:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=_column_hint(header, missing[0]))
    if twice := [key for key in (*wanted, *unit.metadata) if header.count(key) > 1]:
        raise DataError(f"{path} has two columns {twice[0]!r}", hint="rename one of them")
    return header


def _column_hint(header: list[str], missing: str) -> str:
    for separator, name in _OTHER_SEPARATORS.items():
        if len(header) == 1 and missing in header[0].split(separator):
            other = "write it again with commas" if name != "tabs" else "state its format (`format: tsv` of the source)"
            return f"its columns stand apart by {name}: {other}"
    shown = _printable(", ".join(header)[:200])
    return f"its first row: {shown}; name the text's with --json-key (`text:` of the source)"


def _printable(text: str) -> str:
    """Without what a terminal would act on: the file may be none of text at all."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _add_row(batch: Batch, unit: Unit, header: list[str], row: list[str], place: int, tally: UnitTally) -> None:
    if len(row) != len(header):
        tally.reject(batch.path, place, "invalid_csv", f"{len(row)} fields where the first row has {len(header)}")
        return
    try:
        data = "\x1f".join(row).encode("utf-8", "surrogateescape")
        data.decode()
    except UnicodeDecodeError as error:
        tally.reject(batch.path, place, "invalid_utf8", not_utf8(data, error))
        return
    add_record(batch, unit, dict(zip(header, row, strict=True)), place, tally)
