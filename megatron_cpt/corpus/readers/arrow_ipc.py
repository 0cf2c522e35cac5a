"""Arrow files, in the file format and in the stream format, proven whole before their batches are read.

A stream is a schema, messages, and an end mark; a file is "ARROW1", such a stream, a footer and "ARROW1" again. The
library takes a stream without its end mark for a shorter one, ends at the first mark whatever follows it, and believes
a footer that stands behind another file. Walking the messages costs a page each: their bodies are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_cpt.corpus.readers.arrow import pa
from megatron_cpt.errors import DataError

_FILE_MAGIC, _PADDED_MAGIC_BYTES = b"ARROW1", 8
_FOOTER_END_BYTES = 4 + len(_FILE_MAGIC)  # the footer's size, and the magic
_FEATHER_1_MAGIC = b"FEA1"
_END_MARK_BYTES = (8, 4)  # of today's format, and of that before Arrow 0.15


@contextmanager
def open_arrow(path: str) -> Iterator[tuple[Any, Iterator[tuple[Any, float]]]]:
    """Yield the schema, and the record batches each with the share of the file read after it.

    Raises DataError for a file that is not whole.
    """
    with pa.memory_map(path) as source:
        magic = source.read(len(_FILE_MAGIC))
        if magic.startswith(_FEATHER_1_MAGIC):
            raise DataError(f"{path} is a Feather file of version 1", hint="write it again as Parquet or Feather 2")
        is_file = magic == _FILE_MAGIC
        if why := _fault(source, is_file):
            raise DataError(
                f"{path} is damaged or cut short: {why}",
                hint="copy it again; files that were joined with cat are given one by one",
            )
        source.seek(0)
        if is_file:
            file = pa.ipc.open_file(source)
            count = file.num_record_batches
            yield file.schema, ((file.get_batch(i), (i + 1) / count) for i in range(count))
        else:
            stream = pa.ipc.open_stream(source)
            yield stream.schema, ((batch, source.tell() / source.size()) for batch in stream)


def _fault(source: Any, is_file: bool) -> str | None:
    """What is wrong with the frame around the messages; ArrowInvalid or OSError for what is wrong with one of them."""
    source.seek(_PADDED_MAGIC_BYTES if is_file else 0)
    messages, place = pa.ipc.MessageReader.open_stream(source), source.tell()
    while True:
        try:
            messages.read_next_message()
        except StopIteration:
            break
        place = source.tell()
    end, size = source.tell(), source.size()
    if end - place not in _END_MARK_BYTES:
        return "it has no end mark"
    return _footer_fault(source, end, size) if is_file else f"{size - end:,} bytes follow its end" * (end < size)


def _footer_fault(source: Any, end: int, size: int) -> str | None:
    """Between the end mark and the end of a file is its footer and nothing else."""
    source.seek(size - _FOOTER_END_BYTES)
    tail = source.read()
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != _FILE_MAGIC:
        return "it has no footer"
    rest = size - _FOOTER_END_BYTES - footer_bytes - end
    return f"{rest:,} bytes stand between its content and its footer" if rest else None
