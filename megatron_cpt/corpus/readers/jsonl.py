"""jsonl: a range of a file, whole files, or a piece of a stream; memory is bounded by one batch.

Blank lines are not documents.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from megatron_cpt.corpus.documents import NONSTANDARD_JSON, Batch, Reject, UnitTally
from megatron_cpt.corpus.readers.compression import open_input
from megatron_cpt.corpus.readers.encoding import likely_encoding, not_utf8
from megatron_cpt.corpus.readers.records import FieldError, add_record, empty_batch, text_field
from megatron_cpt.corpus.readers.unit import Unit

BATCH_BYTES = 4 << 20
# orjson makes a float of an integer that 64 bits do not hold: two ids would become one.
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a jsonl unit. Places are lines, counted from where the unit begins in the file."""
    stop = sys.maxsize if unit.stop is None or unit.data else unit.stop
    start = 0 if unit.data else unit.start
    for path in unit.paths:
        tally.lines_read = 0
        with open_input(unit.data or path) as file:
            for lines in whole_lines(file, start, stop, max_document_bytes):
                yield _parse(unit, path, lines, tally, max_document_bytes)


def whole_lines(file: BinaryIO, start: int, stop: int, max_line_bytes: int) -> Iterator[bytes]:
    """About BATCH_BYTES of whole lines at a time: every line that begins in [start, stop).

    A line that begins before `start` belongs to the unit before; the last line is read past `stop`. Of a line
    over the limit only limit + 1 bytes or a little more are kept, by which the parser knows it.
    """
    position = start
    if start > 0:
        file.seek(start - 1)
        position = start - 1 + _skip_line(file)
    while position < stop:
        lines = file.read(min(BATCH_BYTES, stop - position))
        if not lines:
            return
        position += len(lines)
        if not lines.endswith(b"\n"):
            rest = file.readline(max_line_bytes + 1)
            position += len(rest)
            lines += rest
            if len(rest) > max_line_bytes and not rest.endswith(b"\n"):
                position += _skip_line(file)
        yield lines


def _skip_line(file: BinaryIO) -> int:
    """Read past the next newline without holding the line. Return the bytes read."""
    skipped = 0
    while piece := file.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _parse(unit: Unit, path: str, data: bytes, tally: UnitTally, max_document_bytes: int) -> Batch:
    """Documents of some lines. Tries all of them at once first: a bad line is rare, a careful loop is slow."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    first_place = tally.lines_read + 1
    tally.lines_read += len(lines)
    field = text_field(unit.text_field)
    if field.simple and not unit.metadata:
        try:
            texts = [orjson.loads(line)[field.field] for line in lines]
            if all(type(text) is str for text in texts) and max(map(len, lines)) <= max_document_bytes:
                tally.documents_read += len(lines)
                return Batch(path, texts, list(range(first_place, first_place + len(lines))))
        except (ValueError, KeyError, TypeError, IndexError):
            pass
    return _parse_one_by_one(unit, path, lines, first_place, tally, max_document_bytes)


def _parse_one_by_one(
    unit: Unit, path: str, lines: list[bytes], first_place: int, tally: UnitTally, max_document_bytes: int
) -> Batch:
    batch = empty_batch(unit, path)
    for place, line in enumerate(lines, first_place):
        if place == 1 and unit.start == 0 and not unit.piece:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        tally.documents_read += 1
        if len(line) > max_document_bytes:
            tally.reject(path, place, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            record = _parse_leniently(unit, line, tally, Reject(path, place, "invalid_json", str(error)))
            if record is None:
                continue
            tally.notes[NONSTANDARD_JSON] += 1
        else:
            if unit.metadata and _LONG_INTEGER.search(line):
                record = _loads(line)
        add_record(batch, unit, record, place, tally)
    return batch


def _loads(line: bytes) -> Any:
    """JSON by Python's parser, with integers as long as they are; those that are too long for Python stay text."""
    return json.loads(line.decode(), parse_int=lambda digits: int(digits) if len(digits) <= 4300 else digits)


def _parse_leniently(unit: Unit, line: bytes, tally: UnitTally, refused: Reject) -> Any:
    """A line that orjson refused, by Python's parser: as in Megatron-LM it takes NaN, Infinity and lone surrogates.

    A document whose text is whole is not lost to another key of its line. Any other line is rejected: None.
    """
    path, place, detail = refused.path, refused.place, refused.detail
    try:
        record = _loads(line)
        text_field(unit.text_field).text_of(record).encode()
    except UnicodeDecodeError as error:
        tally.reject(path, place, "invalid_utf8", not_utf8(line, error))
    except UnicodeEncodeError:
        tally.reject(path, place, "lone_surrogate", detail)
    except (FieldError, RecursionError, ValueError):
        guess = likely_encoding(line)
        tally.reject(path, place, refused.reason, detail + (f"; it looks like {guess}" if guess else ""))
    else:
        return record
    return None
