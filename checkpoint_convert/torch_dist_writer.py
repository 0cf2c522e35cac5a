"""Plan a `torch_dist` checkpoint that Megatron-Core loads under any layout.

The chunk grid follows `--tp`, so that at load time a tensor parallel rank reads its own bytes only; any
other layout still loads, and so the grid need not divide the attention heads, as the ranks of a job must.
Layers are stacked, Megatron-Core's default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_convert.archive import ALIGNMENT, hollow_tensor, saved_object
from checkpoint_convert.checkpoint import ITEM_BYTES, Extent, MismatchError, StoredTensor
from checkpoint_convert.dcp_index import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    Size,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
    index_bytes,
)
from checkpoint_convert.megatron_args import megatron_args, tensor_dtype
from checkpoint_convert.target import Target
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import (
    LAYER_PREFIX,
    MegatronTensor,
    RowSpan,
    hf_shapes,
    megatron_tensors,
    row_spans,
    slice_shape,
)

# Modules whose `_extra_state` Megatron-Core asks for at load; TransformerEngine's further ones may be there too.
EXTRA_STATE_MODULES = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class _Part:
    """One chunk to write: its box in the global tensor and the spans that fill it."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    spans: tuple[RowSpan, ...]


def plan_torch_dist(
    folder: Path,
    arch: Architecture,
    dtypes: dict[str, str],
    max_file_bytes: int,
    tp: int,
    pp: int,
    iteration: int,
    *,
    gammas_less_one: bool = False,
) -> Target:
    """Files, chunks and index of a checkpoint; ConversionError when `tp` does not divide the model."""
    target = Target(folder)
    metadata = Metadata(state_dict_metadata={}, storage_data={}, planner_data={})
    places: dict[str, list[Extent]] = {}
    cursor = _Cursor(folder, max_file_bytes)
    for part in _parts(arch, dtypes, tp):
        before, count, after = hollow_tensor(part.shape, part.dtype)
        path, start = cursor.take(len(before) + count + len(after))
        target.skeleton += [(path, start, before), (path, start + len(before) + count, after)]
        _index(metadata, part, StorageInfo(path.name, start, len(before) + count + len(after)))
        for span in part.spans:
            width = part.shape[-1] if len(part.shape) - part.key.startswith(LAYER_PREFIX) > 1 else 1
            data = start + len(before) + span.row * width * ITEM_BYTES[part.dtype]
            extent = Extent(span.hf_row, span.columns.start or 0, span.rows, width, path, data)
            places.setdefault(span.hf_name, []).append(extent)
    for key, blob in _extra_states(arch):
        path, start = cursor.take(len(blob))
        target.skeleton.append((path, start, blob))
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = StorageInfo(path.name, start, len(blob))
    metadata.planner_data = {key: (key,) for key in metadata.state_dict_metadata}
    for path, size in cursor.sizes.items():
        target.add_file(path, size)
    for tensor in megatron_tensors(arch):
        for name, shape in hf_shapes(tensor, arch).items():
            target.tensors[name] = StoredTensor(name, shape, dtypes[name], tuple(places[name]))
    args = megatron_args(arch, dtypes, tp, pp, None, iteration, gammas_less_one)
    target.small_files |= _small_files(folder, metadata, args)
    return target


class _Cursor:
    """Hands out aligned room in a series of files."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self.sizes: dict[Path, int] = {}

    def take(self, size: int) -> tuple[Path, int]:
        path = self._folder / f"__0_{max(len(self.sizes) - 1, 0)}.distcp"
        start = -(-self.sizes.get(path, 0) // ALIGNMENT) * ALIGNMENT
        if start and start + size > self._limit:
            path, start = self._folder / f"__0_{len(self.sizes)}.distcp", 0
        self.sizes[path] = start + size
        return path, start


def _parts(arch: Architecture, dtypes: dict[str, str], tp: int) -> Iterator[_Part]:
    padded = arch.padded_vocab_size(tp)
    for tensor in megatron_tensors(arch):
        dtype = tensor_dtype(tensor, dtypes)
        stack = () if tensor.layer is None else (tensor.layer,)
        key = tensor.megatron if tensor.layer is None else LAYER_PREFIX + tensor.name_in_layer
        whole = slice_shape(tensor, arch, 1, padded)
        global_shape = (arch.num_layers, *whole) if stack else whole
        for rank in range(tp if tensor.split_dim is not None else 1):
            shape = slice_shape(tensor, arch, tp, padded, by_heads=False)
            for offset, box, parts in _boxes(tensor, arch, tp, rank, padded, shape):
                yield _Part(key, global_shape, stack + offset, (1,) * len(stack) + box, dtype, parts)


def _boxes(
    tensor: MegatronTensor, arch: Architecture, tp: int, rank: int, padded: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[RowSpan, ...]]]:
    """Offset in the global tensor, shape and spans of the chunks of one TP rank: gate and up apart, else one."""
    found = row_spans(tensor, arch, tp, rank, padded, by_heads=False)
    if tensor.kind == "gated":
        for i, span in enumerate(found):
            moved = RowSpan(span.hf_name, span.hf_row, 0, span.rows, span.columns)
            yield (i * arch.ffn_hidden_size + span.hf_row, 0), (span.rows, *shape[1:]), (moved,)
        return
    offset = [0] * len(shape)
    if tensor.split_dim is not None:
        offset[tensor.split_dim] = rank * shape[tensor.split_dim]
    yield tuple(offset), shape, tuple(found)


def _index(metadata: Metadata, part: _Part, info: StorageInfo) -> None:
    """Enter a chunk into the index."""
    entry = metadata.state_dict_metadata.get(part.key)
    if entry is None:
        entry = TensorStorageMetadata(TensorProperties(part.dtype), Size(part.global_shape), [])
        metadata.state_dict_metadata[part.key] = entry
    assert isinstance(entry, TensorStorageMetadata)
    if entry.properties.dtype != part.dtype:
        raise MismatchError(f"{part.key}: layers have different dtypes and cannot be stacked", hint="give --dtype")
    offset = Size(part.offset)
    metadata.storage_data[MetadataIndex(part.key, offset, len(entry.chunks))] = info
    entry.chunks.append(ChunkStorageMetadata(offset, Size(part.shape)))


def _extra_states(arch: Architecture) -> Iterator[tuple[str, bytes]]:
    empty = saved_object([None])
    for module in EXTRA_STATE_MODULES:
        for layer in range(arch.num_layers):
            yield f"{LAYER_PREFIX}{module}._extra_state/shard_{layer}_{arch.num_layers}", empty


def _small_files(folder: Path, metadata: Metadata, args: argparse.Namespace) -> dict[Path, bytes]:
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": args.iteration}
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return {
        folder / "common.pt": saved_object(state),
        folder / "metadata.json": json.dumps(formats).encode(),
        folder / ".metadata": index_bytes(metadata),
    }
