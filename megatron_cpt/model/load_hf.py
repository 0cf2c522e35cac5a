"""Weights of a Hugging Face directory -> this rank's part of the model, each element proven set exactly once.

Every rank reads only its own rows and columns from the safetensors files (memory-mapped), one tensor at a time,
straight into the parameters: peak host memory is the rank's parameters plus its largest single slice. All
parameters are NaN beforehand, so anything left unset is found; padding rows of the vocabulary are zero. Which
rows of which tensor belong to a TP rank is the arithmetic of `megatron_cpt.architecture.tensors`, shared with the
converter.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import (
    LOCAL_TO_TE,
    MegatronTensor,
    hf_tensor_shapes,
    megatron_tensors,
    row_spans,
    slice_shape,
)
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.distributed import failing_together

logger = logging.getLogger(__name__)

_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names; the others hold quantised or packed weights
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # a buffer that early Llama checkpoints carry; computed here


class WeightSource(Protocol):
    """Named Hugging Face tensors, of which any rows and columns can be read."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, rows: slice, columns: slice) -> Tensor: ...


class SafetensorsSource:
    """The safetensors files of a Hugging Face model directory."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._files = {path: _open(path) for path in _weight_files(model_dir)}
        self._file_of: dict[str, Path] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in self._file_of:
                    raise CheckpointError(f"{name} is stored twice, in {self._file_of[name]} and {path}")
                self._file_of[name] = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._files[path].get_slice(name).get_shape()) for name, path in self._file_of.items()}

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        part = self._files[self._file_of[name]].get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"{name} in {self._file_of[name]} holds {part.get_dtype()}: a quantised weight",
                hint="start from the full-precision model",
            )
        values = part[rows] if columns == slice(None) else part[rows, columns]
        if not values.sum(dtype=torch.float64).isfinite():  # without a temporary of its size
            raise CheckpointError(
                f"{name} in {self._file_of[name]} holds NaN or infinite values",
                hint="the checkpoint is damaged; fetch or export it again",
            )
        return values


class RandomSource:
    """Normal(0, 0.02) weights, ones for norms, zeros for biases: a function of seed and tensor name only.

    So they are the same under every layout.
    """

    def __init__(self, arch: Architecture, seed: int, std: float = 0.02) -> None:
        self._shapes = hf_tensor_shapes(arch)
        self._seed, self._std = seed, std
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        values = self._last[1][rows]
        return values if columns == slice(None) else values[:, columns]

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)
        return torch.empty(shape).normal_(0.0, self._std, generator=generator)


def load_hf_weights(chunks: Iterable[GPTModel], model_dir: str | Path, arch: Architecture) -> None:
    """Set every parameter of this rank's chunks from a Hugging Face directory.

    Raises:
        CheckpointError: on every rank when any rank meets a missing, truncated, surplus, misshapen or NaN tensor.
    """
    with failing_together():
        load_weights(chunks, SafetensorsSource(Path(model_dir)), arch)


def random_weights(chunks: Iterable[GPTModel], arch: Architecture, seed: int) -> None:
    """Set every parameter of this rank's chunks to random values that do not depend on the layout."""
    load_weights(chunks, RandomSource(arch, seed), arch)


def load_weights(chunks: Iterable[GPTModel], source: WeightSource, arch: Architecture) -> None:
    """Set every parameter of the chunks from `source`; no collective operation."""
    check_names_and_shapes(source.shapes(), arch)
    tensors = {tensor.megatron: tensor for tensor in megatron_tensors(arch)}
    if arch.tie_word_embeddings:  # the last pipeline stage holds its own copy
        tensors["output_layer.weight"] = tensors[_EMBEDDING]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            _set(parameter, tensors[global_name(chunk, name)], source, arch)
            if name == _EMBEDDING:
                _check_tied_copy(parameter, source, arch)


def global_name(chunk: GPTModel, name: str) -> str:
    """A chunk's parameter name -> the checkpoint's: layers counted over the whole model, TE's names for norms."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match.group(1))].layer_number - 1
    return f"decoder.layers.{layer}.{LOCAL_TO_TE.get(match.group(2), match.group(2))}"


@torch.no_grad()
def _set(parameter: Tensor, tensor: MegatronTensor, source: WeightSource, arch: Architecture) -> None:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    assert tuple(parameter.shape) == slice_shape(tensor, arch, tp), (tensor.megatron, parameter.shape)
    parameter.fill_(float("nan"))
    next_row = 0
    for segment in row_spans(tensor, arch, tp, rank):
        assert segment.row == next_row, f"{tensor.megatron}: row {segment.row} is set twice or skipped"
        rows = slice(segment.hf_row, segment.hf_row + segment.rows)
        parameter[segment.row : segment.row + segment.rows].copy_(source.read(segment.hf_name, rows, segment.columns))
        next_row += segment.rows
    if tensor.kind == "vocab":
        parameter[next_row:].zero_()
    assert not parameter.sum(dtype=torch.float64).isnan(), f"{tensor.megatron}: elements were left unset"


@torch.no_grad()
def _check_tied_copy(embedding: Tensor, source: WeightSource, arch: Architecture) -> None:
    """A stored output layer that the embedding is tied to must equal it: else config.json or the weights are wrong."""
    if not arch.tie_word_embeddings or "lm_head.weight" not in source.shapes():
        return
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    (tensor,) = (tensor for tensor in megatron_tensors(arch) if tensor.megatron == _EMBEDDING)
    for segment in row_spans(tensor, arch, tp, rank):
        copy = source.read("lm_head.weight", slice(segment.hf_row, segment.hf_row + segment.rows), segment.columns)
        if not torch.equal(copy.to(embedding.dtype), embedding[segment.row : segment.row + segment.rows].cpu()):
            raise CheckpointError(
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight",
                hint="set tie_word_embeddings: false in config.json if the model has an output layer of its own; else "
                "remove lm_head.weight from the file",
            )


def check_names_and_shapes(found: dict[str, tuple[int, ...]], arch: Architecture) -> None:
    """CheckpointError naming what is missing, surplus or misshapen."""
    expected = hf_tensor_shapes(arch)
    ignored = {name for name in found if _IGNORED.search(name)}
    if arch.tie_word_embeddings:
        ignored.add("lm_head.weight")  # some tools store the tied copy
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} belongs to nothing in the model" for name in found if name not in expected.keys() | ignored]
    wrong += [
        f"{name} has shape {found[name]}, config.json says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    head, embedding = found.get("lm_head.weight"), expected["model.embed_tokens.weight"]
    if arch.tie_word_embeddings and head not in (None, embedding):
        wrong.append(f"lm_head.weight has shape {head}, and is tied to one of {embedding}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"the weights do not fit config.json: {'; '.join(wrong[:5])}{more}",
            hint="the directory mixes two models or is incomplete; fetch or export it again",
        )


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [model_dir / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index} is not a safetensors index: {error!r}", hint="fetch the model's index again"
            ) from error
    else:
        files = [model_dir / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing",
                hint="model.init_from needs a Hugging Face directory with safetensors weights, all shards of it",
            )
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}", hint="fetch or export it again"
        ) from error
