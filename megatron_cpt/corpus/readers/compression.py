"""Streams out of .gz .bz2 .xz .zst .lz4 files. A cut or damaged file is an error, never a shorter corpus.

A file holds one or more compressed members, one after the other. The readers of Python's library end silently where a
later member of .bz2 or .xz is damaged, and take an empty file for an empty text; the members are therefore read here.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from megatron_cpt.corpus.readers.unreadable import unreadable_file
from megatron_cpt.errors import DataError

READ_BYTES = 1 << 18
MAX_DECODED_BYTES = 1 << 20  # at a time, so that a member of nothing but zeros does not fill the memory


class Member(Protocol):
    """The decoder of one member: `decode` may keep input back, and gives more when it is called with nothing."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...  # input behind the member's end

    def decode(self, data: bytes) -> bytes: ...


class _Library:
    """A member by the decompressor of bz2 or lzma."""

    def __init__(self, decompressor: Any) -> None:
        self._decompressor = decompressor

    def decode(self, data: bytes) -> bytes:
        return bytes(self._decompressor.decompress(data, MAX_DECODED_BYTES))

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decompressor.unused_data)


class _Gzip(_Library):
    """A member by zlib, whose decompressor gives back the input that it did not get to."""

    def __init__(self) -> None:
        super().__init__(zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))

    def decode(self, data: bytes) -> bytes:
        return super().decode(self._decompressor.unconsumed_tail + data)


class _Zstd(_Library):
    def __init__(self) -> None:
        super().__init__(zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj())

    def decode(self, data: bytes) -> bytes:
        return bytes(self._decompressor.decompress(data)) if data else b""


@dataclass(frozen=True)
class _Format:
    """How members of a format are decoded, and how many zero bytes may stand behind one (0: none, n: a multiple)."""

    new_member: Callable[[], Member]
    padding_bytes: int = 0


_FORMATS = {
    ".gz": _Format(_Gzip, padding_bytes=1),  # tapes pad with zeros, and `gzip -t` accepts it
    ".bz2": _Format(lambda: _Library(bz2.BZ2Decompressor())),
    ".xz": _Format(lambda: _Library(lzma.LZMADecompressor(lzma.FORMAT_XZ)), padding_bytes=4),  # "stream padding"
    ".zst": _Format(_Zstd),
    ".zstd": _Format(_Zstd),
}
COMPRESSED_SUFFIXES = (*_FORMATS, ".lz4")
# How files of these formats begin, whatever their names say.
_MAGIC = {
    ".gz": b"\x1f\x8b\x08", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd",
    ".lz4": b"\x04\x22\x4d\x18",
}  # fmt: skip
_BZIP2_BLOCK = b"1AY&SY"  # behind "BZh" and a digit, which a text may begin with


class _Members(io.RawIOBase):
    """All members of a file as one stream. Raises EOFError for a member without an end, and for a file without one."""

    def __init__(self, file: BinaryIO, form: _Format) -> None:
        self._file, self._format = file, form
        self._member: Member | None = None
        self._decoded = memoryview(b"")  # what has not been handed out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decoded:
            if self._member is not None and not self._member.eof and (more := self._member.decode(b"")):
                self._decoded = memoryview(more)
            elif not self._decode_more():
                return 0
        taken = self._decoded[: len(buffer)]
        buffer[: len(taken)] = taken
        self._decoded = self._decoded[len(taken) :]
        return len(taken)

    def _decode_more(self) -> bool:
        """Give the member more input, or begin the next one. Return False at the end of the file."""
        ended = self._member is not None and self._member.eof
        data = self._next_member() if ended else self._file.read(READ_BYTES)
        if not data:
            if self._member is None:
                raise EOFError("it is empty")
            if not ended:
                raise EOFError("its last stream has no end")
            return False
        if self._member is None or ended:
            self._member = self._format.new_member()
        self._decoded = memoryview(self._member.decode(data))
        return True

    def _next_member(self) -> bytes:
        """Input from where the next member begins, behind padding; empty at the end of the file."""
        assert self._member is not None
        data, padding = self._member.unused_data, 0
        while True:
            data = data or self._file.read(READ_BYTES)
            rest = data.lstrip(b"\0") if self._format.padding_bytes else data
            padding += len(data) - len(rest)
            if rest or not data:
                break
            data = b""
        if self._format.padding_bytes and padding % self._format.padding_bytes:
            raise EOFError(f"{padding} zero bytes stand behind one of its streams")
        return rest


def is_compressed(path: str) -> bool:
    """By its name, without regard to case."""
    return path.lower().endswith(COMPRESSED_SUFFIXES)


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
            _refuse_other_format(path, file.peek(16)[:16])
            yield _decompressed(path, file), file
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # bz2 and lz4 raise OSError without a number for damaged data
            raise _damaged(path, error) from error
        if error.filename != path:
            raise
        raise unreadable_file(path, error) from error


def _refuse_other_format(path: str, head: bytes) -> None:
    """Refuse a file whose content is compressed otherwise than its name says."""
    named = Path(path).suffix.lower().replace(".zstd", ".zst")
    found = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), "")
    if found == ".bz2" and head[4:10] != _BZIP2_BLOCK:
        found = ""
    if found and found != named:
        base = Path(path).stem if named in _MAGIC else Path(path).name
        raise DataError(f"{path} is a {found} file by its content", hint=f"rename it to {base}{found}")


def _damaged(path: str, error: Exception) -> DataError:
    suffix = Path(path).suffix
    return DataError(
        f"{path} is damaged or cut short: {error}",
        hint=f"copy it again; if it is not compressed, take {suffix} off its name",
    )


def _decompressed(path: str, file: BinaryIO) -> BinaryIO:
    suffix = Path(path).suffix.lower()
    if suffix == ".lz4":
        return _open_lz4(file)
    if suffix in _FORMATS:
        return cast(BinaryIO, io.BufferedReader(_Members(file, _FORMATS[suffix]), 1 << 20))
    return file


def _open_lz4(file: BinaryIO) -> BinaryIO:
    """Arrow reads lz4 frames, and knows a frame without an end."""
    from megatron_cpt.corpus.readers.arrow import pa

    if not file.read(1):
        raise EOFError("it is empty")
    file.seek(0)
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(file, "lz4"), 1 << 20))
