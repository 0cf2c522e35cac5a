"""Large files that cannot be entered in the middle, cut into blocks while they are read, so that all workers share one.

A compressed jsonl file, a large row group of Parquet and a large Arrow file are streams: one process decodes a stream
and leaves blocks in the staging folder, a few ahead of the workers. A block is a unit of its own; the worker that has
done it deletes its file. Where blocks end depends only on the stream, so the result does not depend on workers, and a
continued run decodes again but gives out only what is not done.

    30000012.block.PID     block 3 of unit 12: jsonl lines, or an Arrow stream of the columns wanted
    000012.blocks.json     sizes of all its blocks in input bytes; written when the reader was at the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.readers.compression import open_with_raw
from megatron_cpt.corpus.readers.lines import line_blocks
from megatron_cpt.corpus.readers.units import Unit
from megatron_cpt.durable import write_atomically

# Unit 12 begins with index 12, its block 3 has index 30000012: unique, and readable in the names of files.
BLOCK_STRIDE = 10_000_000

Pieces = Iterator[tuple[Any, int, float]]  # a piece, its decoded bytes, the share of the stream read so far


def read_blocks(
    stream: Unit, staging: Path, is_mine: Callable[[Unit], bool], is_done: Callable[[Unit], bool], max_line_bytes: int
) -> Iterator[Unit]:
    """The blocks of a stream that are mine; those not done before have a file in `staging`.

    Holds two blocks in memory. Raises DataError for a damaged stream, when it gets there.
    """
    sizes: list[int] = []
    for pieces, size_bytes in _grouped(stream, max_line_bytes):
        block = _block(stream, len(sizes), size_bytes)
        sizes.append(size_bytes)
        if is_mine(block):
            yield block if is_done(block) else _with_file(block, staging, pieces)
    write_atomically(_sizes_path(staging, stream), json.dumps({"sizes": sizes}).encode())


def units_of(unit: Unit, staging: Path) -> list[Unit] | None:
    """What a planned unit became: itself, or its blocks; None for a stream that was never read to its end."""
    if not unit.block_bytes:
        return [unit]
    try:
        sizes = json.loads(_sizes_path(staging, unit).read_bytes())["sizes"]
    except (OSError, ValueError, KeyError):
        return None
    return [_block(unit, number, size) for number, size in enumerate(sizes)]


def forget_block(unit: Unit) -> None:
    """Free the disk of a block that is done."""
    if unit.data:
        Path(unit.data).unlink(missing_ok=True)


def forget_stale_blocks(staging: Path) -> None:
    """Remove what killed readers left. Only for the one process that has the folder for itself."""
    for path in staging.glob("*.block.*"):
        path.unlink(missing_ok=True)


def _block(stream: Unit, number: int, size_bytes: int) -> Unit:
    index = number * BLOCK_STRIDE + stream.index
    return replace(stream, index=index, start=number, stop=number + 1, size_bytes=size_bytes, block_bytes=0)


def _with_file(block: Unit, staging: Path, pieces: list[Any]) -> Unit:
    # named by process: a worker that outlives a killed run may still read, and then delete, the file of that run
    path = staging / f"{block.index:06d}.block.{os.getpid()}"
    if block.format == "jsonl":
        with path.open("wb") as file:
            file.writelines(pieces)
    else:
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pieces[0].schema) as writer:
            for piece in pieces:
                writer.write_batch(piece)
    return replace(block, data=str(path))


def _grouped(stream: Unit, max_line_bytes: int) -> Iterator[tuple[list[Any], int]]:
    """(pieces, input bytes) of each block; the input bytes of all add up to the stream's."""
    pieces: list[Any] = []
    held, given = 0, 0
    waiting: tuple[list[Any], int] | None = None
    for piece, piece_bytes, share in _pieces(stream, max_line_bytes):
        pieces.append(piece)
        held += piece_bytes
        if held >= stream.block_bytes:
            if waiting is not None:
                yield waiting
            here = max(given, min(int(share * stream.size_bytes), stream.size_bytes))
            waiting = pieces, here - given
            pieces, held, given = [], 0, here
    if waiting is not None:
        if pieces:
            yield waiting
        else:
            yield waiting[0], waiting[1] + stream.size_bytes - given
    if pieces:
        yield pieces, stream.size_bytes - given


def _pieces(stream: Unit, max_line_bytes: int) -> Pieces:
    if stream.format == "jsonl":
        yield from _line_pieces(stream, max_line_bytes)
        return
    from megatron_cpt.corpus.readers.columnar import record_batches

    for rows, share in record_batches(stream):
        yield rows, rows.nbytes, share


def _line_pieces(stream: Unit, max_line_bytes: int) -> Pieces:
    with open_with_raw(stream.paths[0]) as (lines, raw):
        for piece in line_blocks(lines, 0, 1 << 62, max_line_bytes):
            # a line over the limit is cut; the parser knows it by its length, and it must not join the next one
            ended = piece if piece.endswith(b"\n") else piece + b"\n"
            yield ended, len(ended), raw.tell() / max(stream.size_bytes, 1)


def _sizes_path(staging: Path, stream: Unit) -> Path:
    return staging / f"{stream.index:06d}.blocks.json"
