"""Streams out of .gz .zst .bz2 .xz files. A cut file is an error, never a shorter corpus."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_cpt.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
READ_BYTES = 1 << 18


def is_compressed(path: str) -> bool:
    """By its name."""
    return path.endswith(COMPRESSED_SUFFIXES)


class _ZstdStream(io.RawIOBase):
    """Concatenated zstd frames as one stream; unlike the library's reader it notices a frame without an end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._started = False
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._file.read(READ_BYTES)
            if not data:
                if self._started and not self._frame.eof:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._started = True
            self._left = self._frame.decompress(data)
        taken = self._left[: len(buffer)]
        buffer[: len(taken)] = taken
        self._left = self._left[len(taken) :]
        return len(taken)


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its suffix. Raises DataError for a missing, cut or damaged file."""
    with open_with_raw(path) as (stream, _):
        yield stream


@contextmanager
def open_with_raw(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """As open_input, and the file beneath, whose position tells how much of it is read."""
    try:
        with Path(path).open("rb") as file:
            yield _decompressed(path, file), file
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short: {error}", hint="copy it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 raises OSError without a number for damaged data
            raise DataError(f"{path} is damaged: {error}", hint="copy it again") from error
        if error.filename != path:
            raise
        raise DataError(f"{path}: {error.strerror}", hint="check the file and its permissions") from error


def _decompressed(path: str, file: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20))
    if path.endswith(".bz2"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if path.endswith(".xz"):
        return cast(BinaryIO, lzma.LZMAFile(file))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(file), 1 << 20))
    return file
