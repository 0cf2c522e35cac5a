"""Megatron's indexed dataset in numpy: read PREFIX.idx/.bin, and write a .idx from streamed lengths.

Layout of PREFIX.idx, little endian:
    9 bytes  "MMIDIDX\\0\\0"      u64 version 1       u8 dtype code (8 = uint16, 4 = int32, others of numpy)
    u64 sequence count S          u64 document count + 1
    i32[S] sequence lengths in tokens      i64[S] byte offset of each sequence in .bin
    i64[documents + 1] index of each document's first sequence, and S at the end
PREFIX.bin is the ids of all sequences without gaps. A document without tokens has no sequence: it repeats
an index.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path
from megatron_cpt.corpus.documents import Encoded
from megatron_cpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLDER_MAGIC = b"TNTIDX\x00\x00"  # of fairseq, and of Megatron-LM until 2023
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip
CODE_OF_DTYPE = {name: code for code, name in DTYPE_CODES.items()}


@dataclass(frozen=True)
class IndexedReader:
    """A dataset mapped into memory; nothing is read until it is asked for."""

    prefix: str
    dtype: str
    sequence_lengths: Array  # i32[S], tokens
    sequence_pointers: Array  # i64[S], bytes
    document_indices: Array  # i64[documents + 1], sequences
    tokens: Array  # all ids of .bin

    @property
    def sequence_count(self) -> int:
        return len(self.sequence_lengths)

    @property
    def document_count(self) -> int:
        return len(self.document_indices) - 1

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    def sequence(self, index: int) -> Array:
        """Ids of one sequence, a view."""
        start = int(self.sequence_pointers[index]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def document(self, index: int) -> Array:
        """Ids of one document, all its sequences in order, a view."""
        first, last = int(self.document_indices[index]), int(self.document_indices[index + 1])
        if first == last:
            return self.tokens[:0]
        start = int(self.sequence_pointers[first]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[first:last].sum())]

    def encoded(self) -> Encoded:
        """All documents as flat ids and lengths; the ids are a view."""
        return Encoded(self.tokens, self.sequence_lengths, np.diff(self.document_indices))

    def __iter__(self) -> Iterator[Array]:
        return (self.document(index) for index in range(self.document_count))


def open_indexed(prefix: str | Path) -> IndexedReader:
    """Map PREFIX.idx and PREFIX.bin. Raises DataError for a file that is missing or not of this format."""
    idx, data = idx_path(prefix), bin_path(prefix)
    for path in (idx, data):
        if not path.is_file():
            raise DataError(f"{path} does not exist", hint="a dataset is PREFIX.bin and PREFIX.idx; give PREFIX")
    try:
        return _map(str(prefix), idx, data)
    except OSError as error:
        raise DataError(
            f"{error.filename or prefix} cannot be read: {error.strerror}", hint="check the file and its permissions"
        ) from error


def _map(prefix: str, idx: Path, data: Path) -> IndexedReader:
    idx_bytes = idx.stat().st_size
    with idx.open("rb") as file:
        header = file.read(HEADER.size)
    if header.startswith(OLDER_MAGIC):
        raise DataError(
            f"{idx} is an index of the older kinds `lazy` and `cached`", hint="write it with --dataset-impl mmap"
        )
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{idx} is not a Megatron index", hint="preprocess again")
    _, version, code, sequences, documents_plus_one = HEADER.unpack(header)
    expected = HEADER.size + 12 * sequences + 8 * documents_plus_one
    if idx_bytes == expected + sequences and sequences:  # a byte for each sequence's mode
        raise DataError(
            f"{idx} is of a multimodal dataset, whose sequences have modes", hint="give a dataset of text alone"
        )
    if version != 1 or code not in DTYPE_CODES or idx_bytes != expected:
        raise DataError(
            f"{idx}: version {version}, dtype code {code}, {idx_bytes:,} bytes where its counts need {expected:,}",
            hint="the file is damaged: copy it again, or preprocess again",
        )
    raw = np.memmap(idx, np.uint8, mode="r")
    lengths_end = HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    dtype = np.dtype(DTYPE_CODES[code])
    if data.stat().st_size % dtype.itemsize:
        raise DataError(f"{data}: its size is not a multiple of {dtype.itemsize} bytes", hint="copy it again")
    tokens = np.memmap(data, dtype, mode="r") if data.stat().st_size else np.empty(0, dtype)
    return IndexedReader(
        prefix=prefix,
        dtype=DTYPE_CODES[code],
        sequence_lengths=raw[HEADER.size : lengths_end].view(np.int32),
        sequence_pointers=raw[lengths_end:pointers_end].view(np.int64),
        document_indices=raw[pointers_end:].view(np.int64),
        tokens=tokens,
    )


def write_index(
    file: BinaryIO,
    dtype: str,
    sequence_count: int,
    document_count: int,
    lengths: Iterable[Array],
    sequences_per_document: Iterable[Array],
) -> None:
    """Write a .idx from streams of pieces, so that memory does not grow with the corpus.

    `lengths` is iterated twice (it must be re-iterable): tokens per sequence, int32.
    `sequences_per_document`: how many sequences each document has, int32.
    """
    file.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[dtype], sequence_count, document_count + 1))
    for piece in lengths:
        file.write(np.ascontiguousarray(piece, np.int32).tobytes())
    offset_bytes, item_bytes = 0, np.dtype(dtype).itemsize
    for piece in lengths:
        ends = np.cumsum(piece, dtype=np.int64) * item_bytes + offset_bytes
        file.write(np.concatenate(([offset_bytes], ends))[:-1].astype(np.int64).tobytes())
        offset_bytes = int(ends[-1]) if len(ends) else offset_bytes
    file.write(np.zeros(1, np.int64).tobytes())
    total = 0
    for piece in sequences_per_document:
        ends = np.cumsum(piece, dtype=np.int64) + total
        file.write(ends.tobytes())
        total = int(ends[-1]) if len(ends) else total
