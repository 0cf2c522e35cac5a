"""Readers of lines and whole files: a unit in, batches of documents out, memory bounded by one batch.

A reader never drops a document silently: what it cannot read it gives to the ledger with place and reason.
Blank lines are not documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.readers.compression import COMPRESSED_SUFFIXES, open_input
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.readers.text_field import FieldError, text_field
from megatron_cpt.corpus.readers.units import Unit

BATCH_BYTES = 4 << 20


def read_unit(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a unit in order; `ledger.documents_read` counts every document met, readable or not."""
    if unit.format == "jsonl":
        yield from _read_jsonl(unit, ledger, max_document_bytes)
    elif unit.format in ("text", "html"):
        yield from _read_whole_files(unit, ledger, max_document_bytes)
    else:
        from megatron_cpt.corpus.readers.columnar import read_columnar

        yield from read_columnar(unit, ledger, max_document_bytes)


def _read_jsonl(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    path = unit.data or unit.paths[0]
    whole = unit.data or path.endswith(COMPRESSED_SUFFIXES)
    start, stop = (0, sys.maxsize) if whole else (unit.start, unit.stop)
    with open_input(path) as file:
        for block in line_blocks(file, start, stop, max_document_bytes):
            yield parse_lines(unit, block, ledger, max_document_bytes)


def line_blocks(file: BinaryIO, start: int, stop: int, max_line_bytes: int) -> Iterator[bytes]:
    """Blocks of about BATCH_BYTES of whole lines, holding every line that begins in [start, stop).

    A line that begins before `start` belongs to the unit before; the last line is read past `stop`. Of a line
    over the limit only limit + 1 bytes or a little more are kept, by which the parser knows it.
    """
    position = start
    if start > 0:
        file.seek(start - 1)
        position = start - 1 + _skip_line(file)
    while position < stop:
        block = file.read(min(BATCH_BYTES, stop - position))
        if not block:
            return
        position += len(block)
        if not block.endswith(b"\n"):
            rest = file.readline(max_line_bytes + 1)
            position += len(rest)
            block += rest
            if len(rest) > max_line_bytes and not rest.endswith(b"\n"):
                position += _skip_line(file)
        yield block


def _skip_line(file: BinaryIO) -> int:
    """Read past the next newline without holding the line; returns the bytes read."""
    skipped = 0
    while piece := file.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def parse_lines(unit: Unit, block: bytes, ledger: Ledger, max_document_bytes: int) -> Batch:
    """Documents of a block of jsonl lines. Tries the whole block first: a bad line is rare, a loop is slow."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    first_place = ledger.lines_read + 1
    ledger.lines_read += len(lines)
    field = text_field(unit.text_field)
    if field.simple and not unit.metadata:
        try:
            texts = [orjson.loads(line)[field.field] for line in lines]
            if all(type(text) is str for text in texts) and max(map(len, lines)) <= max_document_bytes:
                ledger.documents_read += len(lines)
                return Batch(unit.paths[0], texts, list(range(first_place, first_place + len(lines))))
        except (ValueError, KeyError, TypeError, IndexError):
            pass
    return _parse_one_by_one(unit, lines, first_place, ledger, max_document_bytes)


def _parse_one_by_one(
    unit: Unit, lines: list[bytes], first_place: int, ledger: Ledger, max_document_bytes: int
) -> Batch:
    path = unit.paths[0]
    batch = Batch(path, [], [], [] if unit.metadata else None)
    for place, line in enumerate(lines, first_place):
        if place == 1 and unit.start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        ledger.documents_read += 1
        if len(line) > max_document_bytes:
            ledger.reject(path, place, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            add_record(batch, unit, orjson.loads(line), place)
        except orjson.JSONDecodeError as error:
            ledger.reject(path, place, _json_reason(line, str(error)), str(error))
        except FieldError as error:
            ledger.reject(path, place, error.reason, error.detail)
    return batch


def add_record(batch: Batch, unit: Unit, record: Any, place: int) -> None:
    """Append one parsed record to the batch. Raises FieldError when it has no text."""
    batch.texts.append(text_field(unit.text_field).text_of(record))
    batch.places.append(place)
    if batch.metadata is not None:
        batch.metadata.append({key: record.get(key) for key in unit.metadata})


def _json_reason(line: bytes, message: str) -> str:
    """orjson refuses three different things with one exception; tell them apart."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return "invalid_utf8"
    return "lone_surrogate" if "surrogate" in message else "invalid_json"


def _read_whole_files(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    """One document per file, named by its path in the metadata if asked for."""
    for path in unit.paths:
        ledger.documents_read += 1
        with open_input(path) as file:
            data = file.read(max_document_bytes + 1)
        if len(data) > max_document_bytes:
            ledger.reject(path, 1, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            ledger.reject(path, 1, "invalid_utf8", str(error))
            continue
        text = html_to_text(text) if unit.format == "html" else text
        yield Batch(path, [text], [1], [dict.fromkeys(unit.metadata, path)] if unit.metadata else None)
