"""Read and write rows of a tensor through its extents: plain positioned I/O, thread-safe, no mapping.

Mapped pages would count as resident memory; `pread` into one small buffer keeps the peak flat.
"""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from checkpoint_convert.checkpoint import ITEM_BYTES, ChecksummedBytes, Extent, StoredTensor
from megatron_cpt.errors import ConversionError

CHECK_BYTES = 4 * 2**20

Bytes = npt.NDArray[np.uint8]  # (rows, bytes of one row)


class Files:
    """Open file descriptors by path, shared by threads; closed on exit."""

    def __init__(self, *, write: bool = False) -> None:
        self._flags = os.O_RDWR if write else os.O_RDONLY
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._checks: dict[tuple[Path, ChecksummedBytes], threading.Lock] = {}
        self._checked: set[tuple[Path, ChecksummedBytes]] = set()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = os.open(path, self._flags)
            return self._fds[path]

    def check(self, tensor: StoredTensor) -> None:
        """Compare the archive records that hold the tensor with their checksums, each record once.

        ConversionError names file, tensor and byte. What was read here comes from memory when it is copied next.
        """
        for extent in tensor.extents:
            if extent.record is None or not extent.record.has_checksum:
                continue
            key = (extent.path, extent.record)
            with self._lock:
                lock = self._checks.setdefault(key, threading.Lock())
            with lock:
                if key not in self._checked:
                    self._check(extent.path, extent.record, tensor.name)
                    self._checked.add(key)

    def _check(self, path: Path, record: ChecksummedBytes, name: str) -> None:
        buffer, crc = np.empty(min(CHECK_BYTES, record.nbytes), np.uint8), 0
        for start in range(0, record.nbytes, CHECK_BYTES):
            part = buffer[: record.nbytes - start]
            _read(self.fd(path), part, record.offset + start, path)
            crc = zlib.crc32(part.data, crc)
        if crc != record.crc:
            raise ConversionError(
                f"{path}: the checksum of bytes {record.offset} to {record.offset + record.nbytes} does not fit: "
                f"{name} is damaged",
                hint="copy the checkpoint again from where it was saved; the disk may be failing",
            )

    def fsync(self) -> None:
        for fd in self._fds.values():
            os.fsync(fd)


def _read(fd: int, buffer: Bytes, offset: int, path: Path) -> None:
    view = memoryview(buffer.data).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise ConversionError(f"{path} ends before byte {offset + len(view)}", hint="the file is truncated")
        done += count


def _write(fd: int, data: Bytes, offset: int) -> None:
    view = memoryview(data.data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _meet(extent: Extent, start: int, stop: int) -> tuple[int, int] | None:
    """Rows that the extent shares with [start, stop), None when there are none."""
    low, high = max(extent.row, start), min(extent.row + extent.rows, stop)
    return (low, high) if low < high else None


def read_rows(files: Files, tensor: StoredTensor, start: int, stop: int, out: Bytes) -> None:
    """Fill `out`, shape (stop - start, row_bytes), with rows [start, stop) of the tensor."""
    item = ITEM_BYTES[tensor.dtype]
    for extent in tensor.extents:
        if (rows := _meet(extent, start, stop)) is None:
            continue
        low, high = rows
        width = extent.columns * item
        offset = extent.offset + (low - extent.row) * width
        target = out[low - start : high - start]
        if width == tensor.row_bytes:
            _read(files.fd(extent.path), target, offset, extent.path)
        else:
            part = np.empty((high - low, width), np.uint8)
            _read(files.fd(extent.path), part, offset, extent.path)
            target[:, extent.column * item : extent.column * item + width] = part


def write_rows(files: Files, tensor: StoredTensor, start: int, data: Bytes) -> None:
    """Write `data`, shape (rows, row_bytes), as rows from `start` on into every extent that they meet."""
    item = ITEM_BYTES[tensor.dtype]
    for extent in tensor.extents:
        if (rows := _meet(extent, start, start + len(data))) is None:
            continue
        low, high = rows
        width = extent.columns * item
        part = data[low - start : high - start, extent.column * item : extent.column * item + width]
        _write(files.fd(extent.path), np.ascontiguousarray(part), extent.offset + (low - extent.row) * width)


def read_tensor(files: Files, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Bytes:
    """Rows [start, stop) of the tensor in new memory."""
    stop = tensor.rows if stop is None else stop
    out = np.empty((stop - start, tensor.row_bytes), np.uint8)
    read_rows(files, tensor, start, stop, out)
    return out
