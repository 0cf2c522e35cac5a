"""Read Megatron's `torch_dist` checkpoints without Megatron and without a process group.

Such a folder holds `.metadata` (a pickled `torch.distributed.checkpoint` index: every tensor's global shape, its
chunks, and file + byte range of each), `__R_N.distcp` (the chunks, each an archive of `torch.save`),
`common.pt` and `metadata.json`. Layers are stacked by default, `decoder.layers.mlp.linear_fc1.weight` being
(layers, rows, columns), or kept apart, `decoder.layers.7.mlp...`. Both are read; optimizer and RNG state
is left out and counted.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_convert.archive import locate_tensor
from checkpoint_convert.checkpoint import (
    ITEM_BYTES,
    Extent,
    MismatchError,
    StoredTensor,
    Weights,
    check_cover,
    check_dtype,
    check_names,
    check_shape,
)
from checkpoint_convert.dcp_index import ChunkStorageMetadata, Metadata, TensorStorageMetadata, read_index
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import linears
from megatron_cpt.architecture.tensors import LAYER_PREFIX, MegatronTensor, hf_shapes, megatron_tensors, row_spans
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.errors import ConversionError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
# Keys that Megatron-LM, Megatron-Bridge and our trainer write beside the model's weights.
NOT_WEIGHTS = {
    "optimizer": "optimizer state",
    "chained_": "optimizer state",
    "opt_param_scheduler": "schedule state",
    "rng_state": "random number generator state",
    "random_states": "random number generator state",
    "rerun_state_machine_state": "rerun state",
}
EXTRA_STATE = "._extra_state"  # TransformerEngine's fp8 scales; empty for bf16 weights


def read_torch_dist(path: Path, arch: Architecture) -> Weights:
    """Index the model's weights; MismatchError for missing or unknown keys, wrong shapes and holes."""
    metadata = read_index(path)
    weights, ignored = _sort_keys(metadata, path)
    wanted = {tensor.megatron: tensor for tensor in megatron_tensors(arch)}
    stacked = any(key.startswith(LAYER_PREFIX) and not key.split(".")[2].isdigit() for key in weights)
    keys = {_key(tensor, stacked) for tensor in wanted.values()}
    tied_output = weights.pop(OUTPUT, None) if arch.tie_word_embeddings else None
    if tied_output is not None:
        ignored["output layer of a tied model"] = 1
    check_names(keys, weights, path)
    tensors: dict[str, StoredTensor] = {}
    padding = 0
    with _Locator(path, metadata) as locator:
        for tensor in wanted.values():
            entry, name = weights[_key(tensor, stacked)]
            padding = max(padding, _check_size(tensor, entry, stacked, arch, path))
            dtype = check_dtype(tensor.megatron, entry.properties.dtype, path)
            chunks = locator.chunks(name, entry, tensor.layer if stacked else None)
            rows = int(entry.size[1 if stacked and tensor.layer is not None else 0])
            for stored in _hf_tensors(tensor, arch, chunks, dtype, rows):
                check_cover(stored)
                tensors[stored.name] = stored
    return Weights(tensors, (), dict(ignored), padding)


def read_adapters(path: Path, arch: Architecture, lora: LoraConfig) -> Weights:
    """Index the adapters of a checkpoint that holds them alone, by peft's names.

    Raises:
        MismatchError: missing or unknown keys, wrong shapes, holes.
    """
    metadata = read_index(path)
    weights, ignored = _without_other_state(metadata)
    owners = {tensor.name_in_layer.split(".")[-2]: tensor.name_in_layer for tensor in megatron_tensors(arch)}
    tensors: dict[str, StoredTensor] = {}
    keys: set[str] = set()
    with _Locator(path, metadata) as locator:
        for linear in (linears(arch)[name] for name in lora.targets):
            owner = LAYER_PREFIX + owners[linear.fused].rpartition(".")[0]
            for factor in ("A", "B"):
                keys.add(key := f"{owner}.lora.{linear.name}.{factor}")
                if key not in weights:
                    continue  # named below, with all others
                shape = (lora.rank or 0, linear.in_features) if factor == "A" else (linear.out_features, lora.rank or 0)
                check_shape(key, tuple(weights[key].size), (arch.num_layers, *shape), path)
                dtype = check_dtype(key, weights[key].properties.dtype, path)
                for layer in range(arch.num_layers):
                    name = linear.adapter_name(layer, factor)
                    chunks = tuple(locator.chunks(key, weights[key], layer))
                    tensors[name] = StoredTensor(name, shape, dtype, chunks)
                    check_cover(tensors[name])
    check_names(keys, weights, path)
    return Weights(tensors, (), dict(ignored))


def _key(tensor: MegatronTensor, stacked: bool) -> str:
    return LAYER_PREFIX + tensor.name_in_layer if stacked and tensor.layer is not None else tensor.megatron


def _sort_keys(metadata: Metadata, path: Path) -> tuple[dict[str, tuple[TensorStorageMetadata, str]], Counter[str]]:
    """Weights by their plain key (a prefix such as `model.` taken off), and what else there is, counted."""
    names = [key for key in metadata.state_dict_metadata if not key.startswith(tuple(NOT_WEIGHTS))]
    prefixes = {key.removesuffix(EMBEDDING) for key in names if key.endswith(EMBEDDING)}
    if len(prefixes) != 1:
        found = f"{len(prefixes)} keys" if prefixes else "no key"
        raise MismatchError(f"{path}: {found} named *{EMBEDDING}", hint="is this a Megatron-Core GPT checkpoint?")
    (prefix,) = prefixes
    weights, ignored = _without_other_state(metadata)
    return {key.removeprefix(prefix): (entry, key) for key, entry in weights.items()}, ignored


def _without_other_state(metadata: Metadata) -> tuple[dict[str, TensorStorageMetadata], Counter[str]]:
    """The weights by their key, and what else there is, counted."""
    weights: dict[str, TensorStorageMetadata] = {}
    ignored: Counter[str] = Counter()
    for key, entry in metadata.state_dict_metadata.items():
        reason = next((text for start, text in NOT_WEIGHTS.items() if key.startswith(start)), None)
        if reason is None and EXTRA_STATE in key:
            reason = "TransformerEngine extra state"
        if reason is None and not isinstance(entry, TensorStorageMetadata):
            reason = "entries that are not tensors"
        if reason is None:
            assert isinstance(entry, TensorStorageMetadata)
            weights[key] = entry
        else:
            ignored[reason] += 1
    return weights, ignored


def _check_size(
    tensor: MegatronTensor, entry: TensorStorageMetadata, stacked: bool, arch: Architecture, path: Path
) -> int:
    """Compare a tensor's global size with the model's; returns the rows of vocabulary padding."""
    size = tuple(entry.size)
    if stacked and tensor.layer is not None:
        if size[0] != arch.num_layers:
            raise MismatchError(
                f"{path}: {tensor.name_in_layer} has {size[0]} layers, config.json says {arch.num_layers}"
            )
        size = size[1:]
    padding = size[0] - tensor.shape[0] if tensor.kind == "vocab" and size else 0
    if padding < 0 or (size[0] - padding, *size[1:]) != tensor.shape:
        raise MismatchError(f"{path}: {tensor.megatron} has shape {size}, config.json asks for {tensor.shape}")
    return padding


class _Locator:
    """Finds the bytes of chunks; opens each file once."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._path, self._metadata = path, metadata
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._by_layer: dict[str, dict[int, list[Extent]]] = {}
        self._storage: dict[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if index.offset is not None
        }

    def __enter__(self) -> _Locator:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _open(self, name: str) -> tuple[int, int]:
        if name not in self._fds:
            file = self._path / name
            if Path(name).name != name:
                raise ConversionError(f"{self._path}/.metadata names a file outside the folder: {name}")
            if not file.is_file():
                raise ConversionError(f"{self._path}: {name} is missing", hint="copy the whole checkpoint folder")
            self._fds[name] = os.open(file, os.O_RDONLY)
            self._sizes[name] = file.stat().st_size
        return self._fds[name], self._sizes[name]

    def _locate(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> Extent:
        """The chunk as rows and columns of its tensor; of the first layer of the chunk where layers are stacked."""
        info = self._storage.get((key, tuple(chunk.offsets)))
        where = f"{self._path}: {key} at {tuple(chunk.offsets)}"
        if info is None:
            raise MismatchError(f"{where}: the index lists a chunk without a place")
        if getattr(info, "transform_descriptors", None):
            raise ConversionError(f"{where}: compressed chunks are not supported")
        fd, size = self._open(info.relative_path)
        if info.offset + info.length > size:
            raise ConversionError(f"{where}: {info.relative_path} ends too early", hint="the file is truncated")
        found = locate_tensor(fd, info.offset, info.length, f"{where}, byte {info.offset} of {info.relative_path}")
        if found.shape != tuple(chunk.sizes) or found.dtype != entry.properties.dtype:
            wanted = f"{tuple(chunk.sizes)} {entry.properties.dtype}"
            raise ConversionError(f"{where}: the stored chunk is {found.shape} {found.dtype}, the index says {wanted}")
        rest = len(chunk.sizes) - (1 if self._stacked(key) else 0)
        offsets, sizes = (tuple(numbers)[-rest:] for numbers in (chunk.offsets, chunk.sizes))
        column, columns = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
        path = self._path / info.relative_path
        return Extent(offsets[0], column, sizes[0], columns, path, found.offset, found.record)

    def _stacked(self, key: str) -> bool:
        _, inside, rest = key.partition(LAYER_PREFIX)
        return bool(inside) and not rest.split(".")[0].isdigit()

    def chunks(self, key: str, entry: TensorStorageMetadata, layer: int | None) -> Iterator[Extent]:
        """The chunks of a tensor; of one layer when the key stacks all layers (`layer` given)."""
        if layer is None:
            for chunk in entry.chunks:
                yield self._locate(key, entry, chunk)
            return
        if key not in self._by_layer:
            by_layer = self._by_layer[key] = defaultdict(list)
            for chunk in entry.chunks:
                extent = self._locate(key, entry, chunk)
                layer_bytes = math.prod(chunk.sizes[1:]) * ITEM_BYTES[entry.properties.dtype]
                for i in range(chunk.sizes[0]):
                    placed = replace(extent, offset=extent.offset + i * layer_bytes)
                    by_layer[chunk.offsets[0] + i].append(placed)
        yield from self._by_layer[key][layer]


def _hf_tensors(
    tensor: MegatronTensor, arch: Architecture, chunks: Iterator[Extent], dtype: str, rows: int
) -> Iterator[StoredTensor]:
    """The Hugging Face tensors within one global Megatron tensor of `rows` rows, as extents."""
    placed = list(chunks)
    extents: dict[str, list[Extent]] = {name: [] for name in tensor.hf}
    for span in row_spans(tensor, arch, padded_vocab=rows):
        for c in placed:
            low, high = max(span.row, c.row), min(span.row + span.rows, c.row + c.rows)
            if low < high:
                start = c.offset + (low - c.row) * c.columns * ITEM_BYTES[dtype]
                part = replace(c, row=span.hf_row + low - span.row, rows=high - low, offset=start)
                extents[span.hf_name].append(part)
    for name, shape in hf_shapes(tensor, arch).items():
        yield StoredTensor(name, shape, dtype, tuple(extents[name]))
