"""Copy every tensor from its source extents to its target extents, a block of rows at a time.

Per worker thread: one read buffer of BLOCK_BYTES, and as much again for a cast and for a column slice. Every
block is hashed and inspected on its way, so that what is written is known by what was read.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from checkpoint_convert.checkpoint import ITEM_BYTES, LowRank, MismatchError, StoredTensor, Toward, Update
from checkpoint_convert.rows import Bytes, Files, read_rows, read_tensor, write_rows
from megatron_cpt.errors import ConversionError

BLOCK_BYTES = 2 * 2**20  # stays in the CPU's cache from read to write: a third of the system time of 16 MiB
NEAR_ZERO = 1e-12  # a row whose largest magnitude is below this was never trained, or lost

# the bits of infinity and of NEAR_ZERO (below what float16 can hold)
_LIMITS = {
    "float32": (0x7F800000, int(np.float32(NEAR_ZERO).view(np.int32))),
    "bfloat16": (0x7F80, int(np.float32(NEAR_ZERO).view(np.int32)) >> 16),
    "float16": (0x7C00, 0),
}

Advance = Callable[[int], None]  # called with the bytes done since the last call


@dataclass(frozen=True)
class TensorRecord:
    """What the receipt says of a tensor. Hashes are of the Hugging Face tensor's bytes, in row order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    target_dtype: str
    target_sha256: str
    near_zero_rows: int
    nonfinite_rows: int
    shifted_by: int = 0  # added to every element, in fp32
    rounded_elements: int = 0  # of those, how many the target's dtype does not hold exactly
    adapter_rank: int = 0  # of the adapter that was added, in fp32
    moved_by: float = 0.0  # towards another model's tensor, in fp32
    other_sha256: str = ""  # of that tensor

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TensorRecord:
        return TensorRecord(**(value | {"shape": tuple(value["shape"])}))


class Copier:
    """Copies and hashes tensors; one per conversion, used by all its threads."""

    def __init__(self, source: Files, target: Files | None, advance: Advance) -> None:
        self._source, self._target, self._advance = source, target, advance
        self._local = threading.local()

    def _buffer(self, size: int) -> Bytes:
        """This thread's read buffer, grown to `size` bytes when a single row is larger than a block."""
        buffer: Bytes | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._local.buffer = np.empty(max(size, BLOCK_BYTES), np.uint8)
        return buffer

    def blocks(self, tensor: StoredTensor) -> Iterator[tuple[int, Bytes]]:
        """(first row, rows as bytes) over the whole tensor; the bytes are valid until the next step."""
        self._source.check(tensor)
        step = max(1, BLOCK_BYTES // tensor.row_bytes)
        buffer = self._buffer(min(step, tensor.rows) * tensor.row_bytes)
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            block = buffer[: (stop - start) * tensor.row_bytes].reshape(stop - start, tensor.row_bytes)
            read_rows(self._source, tensor, start, stop, block)
            yield start, block

    def sha256(self, tensor: StoredTensor) -> str:
        digest = hashlib.sha256()
        for _, block in self.blocks(tensor):
            digest.update(block.data)
            self._advance(block.size)
        return digest.hexdigest()

    def copy(self, source: StoredTensor, target: StoredTensor, update: Update | None = None) -> TensorRecord:
        """Copy one tensor, cast when the dtypes differ; with `update` made."""
        assert self._target is not None
        before, after = hashlib.sha256(), hashlib.sha256()
        shift = int(source.less_one) - int(target.less_one)
        casts = source.dtype != target.dtype or shift != 0 or update is not None
        updated = None if update is None else _updated(self._source, update, source)
        near_zero = nonfinite = rounded = 0
        for start, block in self.blocks(source):
            before.update(block.data)
            if updated is not None:
                written = updated.to(block, start, target)
            else:
                written = cast(block, source.dtype, target.dtype, shift) if casts else block
            if casts:
                after.update(written.data)
            zero_rows, bad_rows = inspect_rows(written, target.dtype, vector=len(target.shape) == 1)
            near_zero += 0 if target.less_one else zero_rows  # a fresh gamma less 1 is zero
            nonfinite += bad_rows
            rounded += _rounded(block, written, source.dtype, target.dtype, shift) if shift else 0
            write_rows(self._target, target, start, written)
            self._advance(block.size)
        sha = before.hexdigest()
        return TensorRecord(
            source.name,
            source.shape,
            source.dtype,
            sha,
            target.dtype,
            after.hexdigest() if casts else sha,
            near_zero,
            nonfinite,
            shift,
            rounded,
            update.a.rows if isinstance(update, LowRank) else 0,
            update.by if isinstance(update, Toward) else 0.0,
            updated.sha256 if isinstance(updated, _Moved) else "",
        )


def _updated(files: Files, update: Update, source: StoredTensor) -> _Added | _Moved:
    for tensor in update.tensors:
        files.check(tensor)
    return _Added(files, update, source) if isinstance(update, LowRank) else _Moved(files, update, source)


class _Added:
    """The rows of a weight with a low-rank update; A is held whole, and of B the rows of the block."""

    def __init__(self, files: Files, update: LowRank, source: StoredTensor) -> None:
        self._files, self._update, self._dtype = files, update, source.dtype
        self._a = _floats(read_tensor(files, update.a), update.a.dtype)

    def to(self, block: Bytes, start: int, target: StoredTensor) -> Bytes:
        """A weight's rows from `start` on and the update's: summed in fp32, rounded once, to the target's dtype."""
        b = _floats(read_tensor(self._files, self._update.b, start, start + len(block)), self._update.b.dtype)
        return _stored(_floats(block, self._dtype).addmm(b, self._a, alpha=self._update.scale), target)


class _Moved:
    """The rows of a weight, moved towards another model's; both ends are those models' own, bit for bit."""

    def __init__(self, files: Files, update: Toward, source: StoredTensor) -> None:
        self._files, self._update, self._source = files, update, source
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the other model's rows so far."""
        return self._digest.hexdigest()

    def to(self, block: Bytes, start: int, target: StoredTensor) -> Bytes:
        """A weight's rows from `start` on: interpolated in fp32, rounded once, to the target's dtype."""
        other, by = self._update.other, self._update.by
        theirs = read_tensor(self._files, other, start, start + len(block))
        self._digest.update(theirs.data)
        mine, its = (
            _floats(rows, tensor.dtype) + (int(tensor.less_one) - int(target.less_one))
            if tensor.less_one != target.less_one
            else _floats(rows, tensor.dtype)
            for rows, tensor in ((block, self._source), (theirs, other))
        )
        return _stored(mine if by == 0.0 else its if by == 1.0 else mine.lerp(its, by), target)


def _stored(values: Any, target: StoredTensor) -> Bytes:
    """fp32 values as the bytes of the target's dtype."""
    import torch

    written: Bytes = values.to(getattr(torch, target.dtype)).view(torch.uint8).numpy()
    return written


def _floats(block: Bytes, dtype: str) -> Any:
    import torch

    return torch.from_numpy(block).view(getattr(torch, dtype)).float()


def cast(block: Bytes, dtype: str, to: str, shift: int = 0) -> Bytes:
    """Rows of one dtype in another, `shift` added in fp32 first: a gamma that is stored minus 1, or is to be."""
    import torch

    values = torch.from_numpy(block).view(getattr(torch, dtype))
    if shift:
        values = values.float() + shift
    written: Bytes = values.to(getattr(torch, to)).view(torch.uint8).numpy()
    return written


def _rounded(block: Bytes, written: Bytes, dtype: str, to: str, shift: int) -> int:
    """How many elements of `written` are not the exact sum of those of `block` and `shift`."""
    import torch

    before, after = (
        torch.from_numpy(rows).view(getattr(torch, kind)).double() for rows, kind in ((block, dtype), (written, to))
    )
    return int((after - shift != before).sum())


def inspect_rows(block: Bytes, dtype: str, *, vector: bool) -> tuple[int, int]:
    """(near-zero rows, rows with a NaN or infinity); a vector counts as one row.

    The bits of floats order like their magnitudes: the largest signed and the largest unsigned integer of a
    row are its largest positive and its most negative number, found without a temporary array.
    """
    bits = 8 * ITEM_BYTES[dtype]
    signed, unsigned = (np.int16, np.uint16) if bits == 16 else (np.int32, np.uint32)
    rows = block.reshape(1, -1) if vector else block
    positive = rows.view(signed).max(axis=1).astype(np.int64)
    negative = rows.view(unsigned).max(axis=1).astype(np.int64) - (1 << (bits - 1))
    magnitude = np.maximum(positive, negative)  # a sign that does not occur gives a negative number
    infinity, smallest = _LIMITS[dtype]
    return int((magnitude <= max(smallest - 1, 0)).sum()), int((magnitude >= infinity).sum())


def run_parallel(jobs: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """Results of the jobs in order, run by `workers` threads; the first failure stops the rest."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ConversionError(
                    f"the disk is full: {error.strerror}",
                    hint="free some space and start again: it continues from here",
                ) from error
            raise
        return [future.result() for future in futures]


def compare_copies(copier: Copier, tensors: dict[str, StoredTensor], copies: Sequence[StoredTensor]) -> None:
    """Raise MismatchError when a replicated or tied tensor is not the same everywhere."""
    hashes: dict[str, str] = {}
    wrong = []
    for copy in copies:
        if copy.name not in hashes:
            hashes[copy.name] = copier.sha256(tensors[copy.name])
        if copy.dtype != tensors[copy.name].dtype or copier.sha256(copy) != hashes[copy.name]:
            wrong.append(f"{copy.name}: {tensors[copy.name].extents[0].path} and {copy.extents[0].path} differ")
    if wrong:
        raise MismatchError(
            f"{len(wrong)} tensors are stored twice with different values\n  " + "\n  ".join(wrong[:40]),
            hint="a tied or replicated weight went out of step: the checkpoint does not describe one model",
        )
