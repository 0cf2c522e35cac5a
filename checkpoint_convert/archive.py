"""Files of `torch.save`: find where each tensor's bytes lie without reading them, and make empty ones to fill.

Such a file is an uncompressed zip: a pickle of the object, and one record per storage. It is opened under
fake tensors, which remember the record's offset. Only an allow-list of harmless types is unpickled.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_cpt.errors import ConversionError

# What Megatron-LM puts beside the weights, by qualified name. Stand-ins replace them, so that reading needs no
# Megatron and runs none of its code; none of them carries weights.
INERT_TYPES = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunStateMachine",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.training.tokenizer.tokenizer._HuggingFaceTokenizer",
    "signal.Signals",
)


class _Inert:
    """Stands in for a type of INERT_TYPES: accepts any state, does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


def _allow_list() -> list[Any]:
    import numpy as np

    inert: list[Any] = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in INERT_TYPES]
    # the state of numpy's and Python's random generators
    arrays = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.int64)), type(np.dtype(np.float64))]
    rebuild = np.zeros(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [argparse.Namespace, *inert, *arrays, *((rebuild, name) for name in names)]


def load_state(path: Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """The object in a `torch.save` file with fake tensors for weights; `byte_offset` tells where they lie.

    Raises ConversionError for a damaged file, and for a pickle that asks for anything off the allow-list.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ConversionError(
                f"{path} is not a zip file of torch.save",
                hint="damaged, or written before PyTorch 1.6: load and save it once with a current PyTorch",
            )
    try:
        with FakeTensorMode(), torch.serialization.safe_globals(_allow_list()):
            state = torch.load(path, weights_only=not trust_pickle, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} asks for code outside the allow-list: {_first_line(error)}",
            hint="if you made this file yourself, or trust who did, say --trust-pickle",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {_first_line(error)}", hint="the file is damaged") from error
    if not isinstance(state, dict):
        raise ConversionError(f"{path} holds a {type(state).__name__}, expected a dict")
    return state


def _first_line(error: BaseException) -> str:
    text = str(error)
    for line in text.splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.strip()
    return text.splitlines()[0] if text else type(error).__name__


def byte_offset(tensor: torch.Tensor, where: object) -> int:
    """Offset in the file of the first byte of a tensor that `load_state` returned."""
    base = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if base is None or not tensor.is_contiguous():
        raise ConversionError(f"{where}: a tensor is not stored contiguously", hint="save it with .contiguous()")
    return int(base) + int(tensor.storage_offset()) * tensor.element_size()


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self._fd, self._offset, self._length, self._position = fd, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._length)[whence]
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


def locate_tensor(fd: int, offset: int, length: int, where: object) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Byte offset, shape and dtype of the one tensor in a `torch.save` archive that lies within a file.

    Under fake tensors; `map_location="meta"` alone would read the data.
    """
    window = cast(IO[bytes], _Window(fd, offset, length))
    try:
        with FakeTensorMode():
            tensor = torch.load(window, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ConversionError(
            f"{where}: damaged chunk: {_first_line(error)}", hint="the checkpoint is corrupt"
        ) from error
    if not isinstance(tensor, torch.Tensor):
        raise ConversionError(f"{where}: the chunk is not a tensor")
    start = byte_offset(tensor, where)
    if start + tensor.nbytes > length:
        raise ConversionError(f"{where}: damaged chunk: it ends too early", hint="the checkpoint is corrupt")
    return offset + start, tuple(tensor.shape), tensor.dtype


def fake_tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=getattr(torch, dtype))


def _save_hollow(state: object, path: Path) -> None:
    """`torch.save` an object of fake tensors: a sparse file of the full size, whose tensors are holes.

    Records' checksums are left 0, as torch writes them under `set_crc32_options(False)`; it never checks them.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(checksums)


def hollow_state(
    state: dict[str, Any], file_name: str
) -> tuple[int, list[tuple[int, bytes]], dict[tuple[str, str], int]]:
    """Layout of `torch.save(state)` for a dict that holds dicts of fake tensors, without the tensors' bytes.

    Returns the file's size, its other bytes as (offset, bytes), and the offset of each tensor by its two keys.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        _save_hollow(state, path)
        offsets, holes = {}, []
        for outer, inner in load_state(path).items():
            if isinstance(inner, dict):
                for name, tensor in inner.items():
                    if isinstance(tensor, torch.Tensor):
                        offsets[outer, name] = byte_offset(tensor, name)
                        holes.append((offsets[outer, name], tensor.nbytes))
        size, skeleton, end = path.stat().st_size, [], 0
        with path.open("rb") as file:
            for start, count in [*sorted(holes), (size, 0)]:
                file.seek(end)
                skeleton.append((end, file.read(start - end)))
                end = start + count
        return size, skeleton, offsets


@functools.cache
def hollow_tensor(shape: tuple[int, ...], dtype: str) -> tuple[bytes, int, bytes]:
    """`torch.save` archive of one tensor as (bytes before its data, bytes of data, bytes after)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.pt"
        _save_hollow(fake_tensor(shape, dtype), path)
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            start, _, torch_dtype = locate_tensor(fd, 0, size, "a new chunk")
            count = torch.Size(shape).numel() * torch_dtype.itemsize
            return os.pread(fd, start, 0), count, os.pread(fd, size - start - count, start + count)
        finally:
            os.close(fd)
