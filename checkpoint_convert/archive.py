"""Archives of torch.save, read and written without torch: where a tensor's bytes lie, and the bytes around them.

Such a file is an uncompressed zip: a pickle of the object, one record per storage, each with a CRC-32 unless
PyTorch was told to leave it out. A torch_dist checkpoint is made of archives of one tensor each. Importing
torch would cost seconds and 200 MB; the tests compare with what torch itself reads and writes.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from checkpoint_convert.checkpoint import ITEM_BYTES, ChecksummedBytes
from megatron_cpt.errors import ConversionError

STORAGE_TYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_TYPES.items()}
ALIGNMENT = 64  # of each record, PyTorch's own
NO_CHECKSUM = 0  # what PyTorch writes under set_crc32_options(False)
_BIG = 0xFFFFFFFF  # zip fields of 32 bits say this when the number is in an extra field of 64


class Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self._fd, self._offset, self._length, self._position = fd, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._length)[whence]
        if self._position < 0:
            raise OSError("before the start")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(self._length - self._position, 0))
        if count:
            count = os.preadv(self._fd, [view[:count]], self._offset + self._position)
            self._position += count
        return count


def zip_records(file: IO[bytes]) -> dict[str, ChecksummedBytes]:
    """The records of an archive by name without its first folder (`data.pkl`, `data/0`); offsets in the file."""
    records = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            file.seek(info.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.compress_type:
                raise zipfile.BadZipFile(f"record {info.filename} is damaged")
            name_bytes, extra_bytes = struct.unpack("<26x2H", header)
            start = info.header_offset + 30 + name_bytes + extra_bytes
            records[info.filename.partition("/")[2]] = ChecksummedBytes(start, info.file_size, info.CRC)
    return records


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of an archive; `offset` is where its first byte lies in the file."""

    record: ChecksummedBytes | None  # the one that holds it; None when it is planned, not read
    offset: int
    shape: tuple[int, ...]
    dtype: str


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles one tensor to (storage key, dtype, first element, shape, strides), and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, strides, *_: (*storage, first, tuple(shape), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, *_ = pid
        return key, dtype


def locate_tensor(fd: int, offset: int, length: int, where: object) -> PlacedTensor:
    """The one tensor of the archive in bytes [offset, offset + length) of a file; no weight is read."""
    window = cast(IO[bytes], Window(fd, offset, length))
    try:
        records = zip_records(window)
        if "byteorder" in records and _content(fd, offset, records["byteorder"]) != b"little":
            raise ValueError("not little-endian")
        pickled = _content(fd, offset, records["data.pkl"])
        if records["data.pkl"].crc not in (NO_CHECKSUM, zlib.crc32(pickled)):
            raise ValueError("the checksum of data.pkl does not fit")
        found = _TensorUnpickler(io.BytesIO(pickled)).load()
        if not (isinstance(found, tuple) and len(found) == 5):
            raise ConversionError(f"{where}: the chunk is not a tensor")
        key, dtype, first, shape, strides = found
        record = records[f"data/{key}"]
        strides_wanted = _contiguous_strides(shape)
    except ConversionError:
        raise
    except Exception as error:  # whatever broken bytes do to zipfile and pickle
        text = str(error) or type(error).__name__
        raise ConversionError(f"{where}: damaged chunk: {text}", hint="the checkpoint is corrupt") from error
    if any(n > 1 and a != b for n, a, b in zip(shape, strides, strides_wanted, strict=True)):
        raise ConversionError(f"{where}: a tensor is not stored contiguously", hint="save it with .contiguous()")
    item = ITEM_BYTES.get(dtype, 1)
    count = functools.reduce(lambda a, b: a * b, shape, item)
    if first * item + count > record.nbytes or record.offset + record.nbytes > length:
        raise ConversionError(f"{where}: damaged chunk: it ends too early", hint="the checkpoint is corrupt")
    record = ChecksummedBytes(offset + record.offset, record.nbytes, record.crc)
    return PlacedTensor(record, record.offset + first * item, shape, dtype)


def _content(fd: int, offset: int, record: ChecksummedBytes) -> bytes:
    return os.pread(fd, record.nbytes, offset + record.offset)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


# ---------------------------------------------------------------- writing


@functools.cache
def hollow_tensor(shape: tuple[int, ...], dtype: str) -> tuple[bytes, int, bytes]:
    """`torch.save` archive of one tensor as (bytes before its data, bytes of data, bytes after); no checksum."""
    numel = functools.reduce(lambda a, b: a * b, shape, 1)
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + _pickled("storage")
        + f"ctorch\n{STORAGE_NAMES[dtype]}\n".encode()
        + b"".join(_pickled(value) for value in ("0", "cpu", numel))
        + b"tQK\x00"
        + _pickled(shape)
        + _pickled(_contiguous_strides(shape))
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )
    before, count, after = _zip([*_head(pickled), ("data/0", numel * ITEM_BYTES[dtype]), *_TAIL])
    assert isinstance(before, bytes) and isinstance(count, int) and isinstance(after, bytes)
    return before, count, after


def saved_object(value: object) -> bytes:
    """What `torch.save` writes for an object without tensors."""
    (data,) = _zip([*_head(pickle.dumps(value, protocol=2)), *_TAIL])
    assert isinstance(data, bytes)
    return data


def _pickled(value: object) -> bytes:
    """The opcodes that push a number, a string or a tuple of numbers, without memo."""
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item) for item in value) + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value)) + value.encode()
    return pickle.dumps(value, protocol=2)[2:-1]


_RecordData = tuple[str, bytes | int]  # a number stands for so many bytes to be filled in
_TAIL: list[_RecordData] = [("version", b"3\n"), (".data/serialization_id", b"0" * 40)]


def _head(pickled: bytes) -> list[_RecordData]:
    marks: list[_RecordData] = [(".format_version", b"1"), (".storage_alignment", str(ALIGNMENT).encode())]
    return [("data.pkl", pickled), *marks, ("byteorder", b"little")]


def _zip(records: Sequence[_RecordData]) -> list[bytes | int]:
    """An uncompressed zip in pieces: bytes, and lengths of what is filled in later."""
    pieces: list[bytes | int] = []
    before, position, central = b"", 0, b""
    for name, data in records:
        size, crc = (data, NO_CHECKSUM) if isinstance(data, int) else (len(data), zlib.crc32(data))
        path = b"archive/" + name.encode()
        sizes = struct.pack("<2Q", size, size) if size >= _BIG else b""
        extra = struct.pack("<2H", 1, len(sizes)) + sizes if sizes else b""
        padding = -(position + 30 + len(path) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fixed = struct.pack("<5H3L", 45, 0x800, 0, 0, 0, crc, min(size, _BIG), min(size, _BIG))
        header = b"PK\x03\x04" + fixed + struct.pack("<2H", len(path), len(extra)) + path + extra
        far = sizes + (struct.pack("<Q", position) if position >= _BIG else b"")
        far = struct.pack("<2H", 1, len(far)) + far if far else b""
        rest = struct.pack("<5H2L", len(path), len(far), 0, 0, 0, 0, min(position, _BIG))
        central += b"PK\x01\x02" + struct.pack("<H", 45) + fixed + rest + path + far
        before += header + (b"" if isinstance(data, int) else data)
        if isinstance(data, int):
            pieces += [before, data]
            before = b""
        position += len(header) + size
    count, large = len(records), b""
    if position >= _BIG:
        large = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, len(central), position)
        large += b"PK\x06\x07" + struct.pack("<LQL", 0, position + len(central), 1)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, count, count, len(central), min(position, _BIG), 0)
    return [*pieces, before + central + large + end]
