"""Readers of lines and whole files: a unit in, batches of documents out, memory bounded by one batch.

A reader never drops a document silently: what it cannot read it gives to the ledger with place and reason.
Blank lines are not documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from megatron_cpt.corpus.documents import Batch, Ledger
from megatron_cpt.corpus.sources import Unit
from megatron_cpt.errors import DataError

BATCH_BYTES = 4 << 20


def read_unit(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a unit in order; `ledger.documents_read` counts every document met, readable or not."""
    if unit.format == "jsonl":
        yield from _read_jsonl(unit, ledger, max_document_bytes)
    elif unit.format == "text":
        yield from _read_text_files(unit, ledger, max_document_bytes)
    else:
        from megatron_cpt.corpus.readers_columnar import read_parquet

        yield from read_parquet(unit, ledger, max_document_bytes)


def open_input(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="check the file and its permissions") from error


def _read_jsonl(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    path = unit.paths[0]
    with open_input(path) as file:
        for block in _line_blocks(file, unit.start, unit.stop, max_document_bytes):
            yield parse_lines(path, block, unit.text_key, ledger, max_document_bytes)


def _line_blocks(file: BinaryIO, start: int, stop: int, max_line_bytes: int) -> Iterator[bytes]:
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


def parse_lines(path: str, block: bytes, text_key: str, ledger: Ledger, max_document_bytes: int) -> Batch:
    """Documents of a block of jsonl lines. Tries the whole block first: a bad line is rare, a loop is slow."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    first_place = ledger.lines_read + 1
    ledger.lines_read += len(lines)
    try:
        texts = [orjson.loads(line)[text_key] for line in lines]
        if all(type(text) is str for text in texts) and max(map(len, lines)) <= max_document_bytes:
            ledger.documents_read += len(lines)
            return Batch(path, texts, list(range(first_place, first_place + len(lines))))
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    return _parse_one_by_one(path, lines, first_place, text_key, ledger, max_document_bytes)


def _parse_one_by_one(
    path: str, lines: list[bytes], first_place: int, text_key: str, ledger: Ledger, max_document_bytes: int
) -> Batch:
    batch = Batch(path, [], [])
    for place, line in enumerate(lines, first_place):
        if first_place == place == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        ledger.documents_read += 1
        if len(line) > max_document_bytes:
            ledger.reject(path, place, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            ledger.reject(path, place, _json_reason(line, str(error)), str(error))
            continue
        text = text_of(value, text_key, path, place, ledger)
        if text is not None:
            batch.texts.append(text)
            batch.places.append(place)
    return batch


def text_of(value: Any, text_key: str, path: str, place: int, ledger: Ledger) -> str | None:
    """The text of one parsed record, or None after a reject."""
    if not isinstance(value, dict):
        ledger.reject(path, place, "not_an_object", f"a JSON {type(value).__name__}")
    elif text_key not in value:
        ledger.reject(path, place, "missing_key", f"no key {text_key!r}; keys: {', '.join(map(str, value))}")
    elif not isinstance(value[text_key], str):
        ledger.reject(path, place, "text_not_a_string", f"{text_key!r} is {type(value[text_key]).__name__}")
    else:
        return str(value[text_key])
    return None


def _json_reason(line: bytes, message: str) -> str:
    """orjson refuses three different things with one exception; tell them apart."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return "invalid_utf8"
    return "lone_surrogate" if "surrogate" in message else "invalid_json"


def _read_text_files(unit: Unit, ledger: Ledger, max_document_bytes: int) -> Iterator[Batch]:
    """One document per file. Batches hold one file, so that the path of a reject is exact."""
    for path in unit.paths:
        ledger.documents_read += 1
        with open_input(path) as file:
            data = file.read(max_document_bytes + 1)
        if len(data) > max_document_bytes:
            ledger.reject(path, 1, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            yield Batch(path, [data.decode("utf-8-sig")], [1])
        except UnicodeDecodeError as error:
            ledger.reject(path, 1, "invalid_utf8", str(error))
