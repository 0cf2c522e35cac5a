"""Whole state dicts of `torch.save`: find where each tensor's bytes lie without reading them, and make hollow ones.

They hold anything, so torch itself opens them (archive.py says what such a file is): under fake tensors, which
remember their record's offset. Only an allow-list of harmless types is unpickled.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint_convert.archive import PlacedTensor, zip_records
from checkpoint_convert.checkpoint import ChecksummedBytes
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


class Records:
    """The zip records of a state file, to look up in which one a tensor of `load_state` lies."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._by_offset = {record.offset: record for record in zip_records(file).values()}
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ConversionError(f"{path} cannot be read: {error}", hint="the file is damaged") from error

    def place(self, tensor: torch.Tensor, where: object) -> PlacedTensor:
        offset = byte_offset(tensor, where)
        record: ChecksummedBytes | None = self._by_offset.get(
            offset - int(tensor.storage_offset()) * tensor.element_size()
        )
        if record is None or offset + tensor.nbytes > record.offset + record.nbytes:
            raise ConversionError(f"{where}: no record of the file holds it", hint="the file is damaged")
        return PlacedTensor(record, offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


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
