"""Hugging Face weights: safetensors, single or sharded (read and write), and pytorch_model.bin (read).

A safetensors file is a u64 header length, a JSON header (name -> dtype, shape, byte range) and the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_convert.checkpoint import (
    ITEM_BYTES,
    ChecksummedBytes,
    Extent,
    MismatchError,
    StoredTensor,
    Weights,
    check_dtype,
    check_names,
    check_shape,
)
from checkpoint_convert.target import Target
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import hf_tensor_shapes
from megatron_cpt.errors import ConversionError

SINGLE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
CONSOLIDATED = "consolidated"
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 10**8  # the format's own limit
ROTARY_BUFFER = ".rotary_emb.inv_freq"  # saved by old Llama exports; computed from config.json, never read
TIED_OUTPUT = "lm_head.weight"


def is_hf(path: Path) -> bool:
    names = (SINGLE, SAFETENSORS_INDEX, "pytorch_model.bin", BIN_INDEX)
    return any((path / name).is_file() for name in names) or any(path.glob("*.safetensors"))


def read_hf(path: Path, arch: Architecture, *, trust_pickle: bool = False) -> Weights:
    """Index the weights of a Hugging Face folder; MismatchError when they are not the model of config.json."""
    stored = _read_all(path, trust_pickle)
    wanted = hf_tensor_shapes(arch)
    buffers = [name for name in stored if name.endswith(ROTARY_BUFFER)]
    for name in buffers:
        del stored[name]
    tied = stored.pop(TIED_OUTPUT, None) if arch.tie_word_embeddings else None
    check_names(wanted, stored, path)
    tensors = {}
    for name, shape in wanted.items():
        check_shape(name, stored[name].shape, shape, path)
        check_dtype(name, stored[name].dtype, path)
        tensors[name] = stored[name]
    copies: tuple[StoredTensor, ...] = ()
    if tied is not None:
        embedding = next(iter(tensors))
        check_shape(TIED_OUTPUT, tied.shape, wanted[embedding], path)
        copies = (StoredTensor(embedding, tied.shape, tied.dtype, tied.extents),)
    ignored = {"rotary buffers (computed from config.json)": len(buffers)} if buffers else {}
    return Weights(tensors, copies, ignored)


def _read_all(path: Path, trust_pickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files by name, each found once."""
    files, index = weight_files(path)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        found = read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file, trust_pickle)
        for name, tensor in found.items():
            if name in stored:
                raise MismatchError(
                    f"{name} is stored twice: in {stored[name].extents[0].path.name} and {file.name}",
                    hint="keep the files of one model only",
                )
            stored[name] = tensor
    if index is not None:
        check_names(_read_index(index), stored, index)
    return stored


def weight_files(path: Path) -> tuple[list[Path], Path | None]:
    """The files that hold a folder's weights, and the index that names them where there is one.

    The shards of model.safetensors.index.json, else every *.safetensors, else the same of pytorch_model*.bin.
    `consolidated*.safetensors`, which Mistral puts beside them, is the same weights by other names and no part.
    """
    for pattern, index in (("*.safetensors", SAFETENSORS_INDEX), ("pytorch_model*.bin", BIN_INDEX)):
        if (path / index).is_file():
            return _shards_of(path / index), path / index
        files = sorted(file for file in path.glob(pattern) if not file.name.startswith(CONSOLIDATED))
        if len(files) > 1 and any("-of-" in file.name for file in files):
            raise ConversionError(f"{path} holds {len(files)} shards and no {index}", hint="download the index too")
        if files:
            return files, None
    hint = "give a Hugging Face model folder with its weights, all shards of it"
    if any(path.glob(f"{CONSOLIDATED}*.safetensors")):
        hint = f"{CONSOLIDATED}*.safetensors has Mistral's own names: download the model*.safetensors beside it"
    raise ConversionError(f"no *.safetensors and no pytorch_model*.bin in {path}", hint=hint)


def _shards_of(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_read_index(index).values()))]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ConversionError(f"{index} names files that are not there: {', '.join(lost)}", hint="download them")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is not a weight index: {error!r}", hint="download the index again") from error
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise ConversionError(
            f"{path}: weight_map must map tensor names to file names of the same folder",
            hint="download the index again",
        )
    return where


def _whole(
    name: str, shape: tuple[int, ...], dtype: str, path: Path, offset: int, record: ChecksummedBytes | None = None
) -> StoredTensor:
    return StoredTensor(name, shape, dtype, (Extent(0, 0, shape[0], math.prod(shape[1:]), path, offset, record),))


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; ConversionError when the header and the file's size do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ConversionError(f"{path} is truncated within its header", hint="download it again")
        try:
            header: dict[str, dict[str, Any]] = dict(json.loads(file.read(min(length, MAX_HEADER_BYTES))))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            spans = [(n, e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"])) for n, e in entries]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConversionError(f"{path} has a damaged header: {error}", hint="download it again") from error
    tensors, data, end = {}, 8 + length, 0
    for name, code, shape, low, high in spans:
        dtype = DTYPE_NAMES.get(code, str(code))
        item = ITEM_BYTES.get(dtype)
        if low != end or high < low or (item is not None and high - low != math.prod(shape) * item):
            raise ConversionError(f"{path} has a damaged header: the byte range of {name} is wrong")
        end = high
        tensors[name] = _whole(name, shape or (1,), dtype, path, data + low)
    if data + end != size:
        what = "truncated" if data + end > size else "longer than its header says"
        raise ConversionError(f"{path} is {what}: {size} bytes, expected {data + end}", hint="download it again")
    return tensors


def _read_bin(path: Path, trust_pickle: bool) -> dict[str, StoredTensor]:
    from checkpoint_convert.state_file import Records, load_state  # torch, which no other format of this module needs

    state = load_state(path, trust_pickle=trust_pickle)
    tensors, records = {}, Records(path)
    for name, tensor in state.items():
        if not hasattr(tensor, "untyped_storage"):
            raise MismatchError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        found = records.place(tensor, f"{path}: {name}")
        tensors[name] = _whole(name, found.shape or (1,), found.dtype, path, found.offset, found.record)
    return tensors


def plan_hf(folder: Path, arch: Architecture, dtypes: dict[str, str], max_shard_bytes: int) -> Target:
    """Where each tensor goes in a new Hugging Face folder, and the headers of its files."""
    shapes = hf_tensor_shapes(arch)
    shards = list(_shards(shapes, dtypes, max_shard_bytes))
    target = Target(folder)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = folder / (SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        add_safetensors(target, path, {name: shapes[name] for name in names}, dtypes)
        weight_map |= dict.fromkeys(names, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in target.tensors.values())}, "weight_map": weight_map}
        target.small_files[folder / SAFETENSORS_INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return target


def add_safetensors(target: Target, path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> None:
    """Plan one file with these tensors, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtypes[name]]
        header[name] = {"dtype": DTYPE_CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.add_file(path, 8 + len(text) + end)
    target.skeleton.append((path, 0, struct.pack("<Q", len(text)) + text))
    for name, shape in shapes.items():
        target.tensors[name] = _whole(name, shape, dtypes[name], path, 8 + len(text) + header[name]["data_offsets"][0])


def _shards(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], limit: int) -> Iterator[list[str]]:
    """Names in order, cut so that no file exceeds the limit unless one tensor alone does."""
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * ITEM_BYTES[dtypes[name]]
        if names and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
