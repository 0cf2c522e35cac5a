"""The footer of a Parquet file, read and checked here: what it says of row groups decides where units begin and end.

pyarrow ends the process at some damaged footers when it is asked for a column's sizes, reads fewer rows than there are
at others, and takes the last footer of joined files for that of the first. A footer is a struct of Thrift's compact
protocol; a struct is read as field number -> value, by the numbers of parquet.thrift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_cpt.errors import DataError

_MAGIC = b"PAR1"
_END_BYTES = 8  # the footer's size, and the magic
_FILE_ROWS, _FILE_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_BYTES, _GROUP_ROWS = 1, 2, 3
_COLUMN_FACTS = 3
_COMPRESSED_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 7, 9, 11


@dataclass(frozen=True)
class RowGroup:
    """What a footer says of a row group; sizes in bytes, before and after decompression."""

    rows: int
    compressed_bytes: int
    uncompressed_bytes: int


def row_groups(path: str) -> tuple[RowGroup, ...]:
    """Return the row groups of a Parquet file that pyarrow opens. Raises DataError for a damaged or joined file."""
    stat = Path(path).stat()
    return _row_groups(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)  # the units of a file follow each other
def _row_groups(path: str, size: int, _: int) -> tuple[RowGroup, ...]:
    with Path(path).open("rb") as file:
        file.seek(size - _END_BYTES)
        footer_start = size - _END_BYTES - int.from_bytes(file.read(4), "little")
        file.seek(max(footer_start, 0))
        footer = file.read(size - _END_BYTES - footer_start)
        try:
            groups, end = _parse(footer, footer_start)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged: its footer is no footer ({error!r})", hint="copy it again") from error
        # between the last column and the footer are indexes; of joined files, whole files
        file.seek(end)
        if _MAGIC * 2 in file.read(footer_start - end):
            raise DataError(f"{path} is several Parquet files joined", hint="give each as a file of its own")
    return groups


def _parse(footer: bytes, footer_start: int) -> tuple[tuple[RowGroup, ...], int]:
    """The row groups, and where the last column ends in the file. Raises ValueError for what cannot be so."""
    fields = _CompactReader(footer).struct()
    groups, end = [], len(_MAGIC)
    for group in fields[_FILE_GROUPS]:
        compressed = 0
        for column in group[_GROUP_COLUMNS]:
            facts = column[_COLUMN_FACTS]
            offsets = [facts[_DATA_OFFSET], facts.get(_DICTIONARY_OFFSET, 0)]
            start = min((offset for offset in offsets if offset > 0), default=len(_MAGIC))  # 0: it has no such page
            stop = start + facts[_COMPRESSED_BYTES]
            if not len(_MAGIC) <= start <= stop <= footer_start:
                raise ValueError(f"a column from byte {start:,} to {stop:,} of {footer_start:,}")
            compressed += facts[_COMPRESSED_BYTES]
            end = max(end, stop)
        groups.append(RowGroup(group[_GROUP_ROWS], compressed, group[_GROUP_BYTES]))
    if (
        min((group.rows for group in groups), default=0) < 0
        or sum(group.rows for group in groups) != fields[_FILE_ROWS]
    ):
        raise ValueError(f"row groups of {sum(group.rows for group in groups):,} rows for {fields[_FILE_ROWS]:,}")
    return tuple(groups), end


class _CompactReader:
    """Values of Thrift's compact protocol, one after the other. Raises IndexError or ValueError for what is none."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            # a boolean field has its value in the kind
            fields[number] = kind & 15 == 1 if kind & 15 <= 2 else self._value(kind & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            return self._bytes(self._varint())
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            return self._list()
        if kind == 11:
            return self._map()
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return self._bytes(8)
        raise ValueError(f"type {kind}")

    def _list(self) -> list[Any]:
        head = self._byte()
        size = self._varint() if head >> 4 == 15 else head >> 4
        return [self._value(head & 15) for _ in range(size)]

    def _map(self) -> list[tuple[Any, Any]]:
        size = self._varint()
        kinds = self._byte() if size else 0
        return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]

    def _byte(self) -> int:
        byte = self._data[self._place]
        self._place += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._place:
            raise ValueError(f"{count:,} bytes where {len(self._data) - self._place:,} are left")
        self._place += count
        return self._data[self._place - count : self._place]
