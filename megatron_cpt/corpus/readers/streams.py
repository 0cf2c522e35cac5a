"""Large files that cannot be read from an arbitrary offset, cut into pieces while they are read, for all workers.

A compressed jsonl file, a large row group of Parquet and a large Arrow file are streams: one process decodes a stream
and leaves pieces in the staging folder, a few ahead of the workers. A piece is a unit of its own; the worker that has
done it deletes its file. Where pieces end depends only on the stream, so the result does not depend on workers, and a
continued run decodes again but gives out only what is not done.

    000012-0003.piece.PID   piece 3 of stream 12: jsonl lines, or an Arrow stream of the columns wanted
    000012.pieces.json      sizes of all its pieces in input bytes; written when the reader was at the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.readers.compression import open_with_raw
from megatron_cpt.corpus.readers.jsonl import whole_lines
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.durable import write_atomically

# Some lines or rows, their decoded bytes, the share of the stream read so far.
Decoded = Iterator[tuple[Any, int, float]]


def read_pieces(
    stream: Unit, staging: Path, is_mine: Callable[[Unit], bool], is_done: Callable[[Unit], bool], max_line_bytes: int
) -> Iterator[Unit]:
    """The pieces of a stream that are mine; those not done before have a file in `staging`.

    Holds two pieces in memory. Raises DataError for a damaged stream, when it gets there.
    """
    sizes: list[int] = []
    for content, size_bytes in _grouped(stream, max_line_bytes):
        piece = stream.as_piece(len(sizes), size_bytes)
        sizes.append(size_bytes)
        if is_mine(piece):
            yield piece if is_done(piece) else _with_file(piece, staging, content)
    write_atomically(_sizes_path(staging, stream), json.dumps({"sizes": sizes}).encode())


def units_of(unit: Unit, staging: Path) -> list[Unit] | None:
    """What a planned unit became: itself, or its pieces; None for a stream that was never read to its end."""
    if not unit.is_stream:
        return [unit]
    try:
        sizes = json.loads(_sizes_path(staging, unit).read_bytes())["sizes"]
    except (OSError, ValueError, KeyError):
        return None
    return [unit.as_piece(number, size) for number, size in enumerate(sizes)]


def forget_piece(unit: Unit) -> None:
    """Free the disk of a piece that is done."""
    if unit.data:
        Path(unit.data).unlink(missing_ok=True)


def forget_stale_pieces(staging: Path) -> None:
    """Remove what killed readers left. Only for the one process that has the folder for itself."""
    for path in staging.glob("*.piece.*"):
        path.unlink(missing_ok=True)


def _with_file(piece: Unit, staging: Path, content: list[Any]) -> Unit:
    # named by process: a worker that outlives a killed run may still read, and then delete, the file of that run
    path = staging / f"{piece.name}.piece.{os.getpid()}"
    if piece.format == "jsonl":
        with path.open("wb") as file:
            file.writelines(content)
    else:
        from megatron_cpt.corpus.readers.arrow import pa

        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content[0].schema) as writer:
            for rows in content:
                writer.write_batch(rows)
    return replace(piece, data=str(path))


def _grouped(stream: Unit, max_line_bytes: int) -> Iterator[tuple[list[Any], int]]:
    """(content, input bytes) of each piece; the input bytes of all add up to the stream's."""
    content: list[Any] = []
    held, given = 0, 0
    waiting: tuple[list[Any], int] | None = None
    for part, part_bytes, share in _decoded(stream, max_line_bytes):
        content.append(part)
        held += part_bytes
        if held >= stream.piece_bytes:
            if waiting is not None:
                yield waiting
            here = max(given, min(int(share * stream.size_bytes), stream.size_bytes))
            waiting = content, here - given
            content, held, given = [], 0, here
    if waiting is not None:
        if content:
            yield waiting
        else:
            yield waiting[0], waiting[1] + stream.size_bytes - given
    if content:
        yield content, stream.size_bytes - given


def _decoded(stream: Unit, max_line_bytes: int) -> Decoded:
    if stream.format == "jsonl":
        yield from _decoded_lines(stream, max_line_bytes)
        return
    from megatron_cpt.corpus.readers.columnar import record_batches

    for rows, share in record_batches(stream, stream.paths[0]):
        yield rows, rows.nbytes, share


def _decoded_lines(stream: Unit, max_line_bytes: int) -> Decoded:
    with open_with_raw(stream.paths[0]) as (file, raw):
        for lines in whole_lines(file, 0, 1 << 62, max_line_bytes):
            # a line over the limit is cut; the parser knows it by its length, and it must not join the next one
            ended = lines if lines.endswith(b"\n") else lines + b"\n"
            yield ended, len(ended), raw.tell() / max(stream.size_bytes, 1)


def _sizes_path(staging: Path, stream: Unit) -> Path:
    return staging / f"{stream.name}.pieces.json"
