"""Weights of a Hugging Face folder -> this rank's part of the model, each element proven set exactly once.

The folder is listed and checked by the converter's reader (`checkpoint_convert.hf`): what converts also trains. Every
rank reads only the rows that it holds, a block at a time, straight into the parameters: peak host memory is the
rank's parameters plus one block. All parameters are NaN beforehand, so anything left unset is found; padding rows of
the vocabulary are zero. Which rows of which tensor belong to a TP rank is the arithmetic of
`megatron_cpt.architecture.tensors`, shared with the converter. Nothing here relies on `assert`: `python -O` proves
the same.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from checkpoint_convert.checkpoint import as_checkpoint_error
from checkpoint_convert.hf import TIED_OUTPUT, read_hf
from checkpoint_convert.rows import Files, read_tensor
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import (
    LOCAL_TO_TE,
    MegatronTensor,
    RowSpan,
    hf_tensor_shapes,
    megatron_tensors,
    row_spans,
    slice_shape,
)
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.distributed import failing_together

_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
BLOCK_BYTES = 2 * 2**20  # of what is read at once
SHOWN_FAULTS = 10

InBase = Callable[[str], bool]  # name in a checkpoint -> whether the base model has this weight


class WeightSource(Protocol):
    """Named Hugging Face tensors, of which any rows and columns can be read."""

    has_tied_copy: bool  # `lm_head.weight` can be read although the model's output layer is tied

    def read(self, name: str, start: int, stop: int, columns: slice) -> Tensor:
        """Rows [start, stop) of a tensor, of these columns only where it has two dimensions."""
        ...

    def row_bytes(self, name: str) -> int: ...


class FolderSource:
    """A Hugging Face folder. Raises CheckpointError unless its weights are those that config.json describes."""

    def __init__(self, model_dir: Path, arch: Architecture, files: Files) -> None:
        with as_checkpoint_error(model_dir):
            weights = read_hf(model_dir, arch)
        self.has_tied_copy = bool(weights.copies)
        self._tensors = dict(weights.tensors)
        if self.has_tied_copy:
            (self._tensors[TIED_OUTPUT],) = weights.copies
        self._model_dir, self._files = model_dir, files

    def read(self, name: str, start: int, stop: int, columns: slice) -> Tensor:
        stored = self._tensors[name]
        with as_checkpoint_error(self._model_dir):
            self._files.check(stored)
            block = read_tensor(self._files, stored, start, stop)
        values = torch.from_numpy(block).view(getattr(torch, stored.dtype))
        return values[:, columns] if len(stored.shape) > 1 else values.flatten()

    def row_bytes(self, name: str) -> int:
        return self._tensors[name].row_bytes


class RandomSource:
    """Normal(0, 0.02) weights, ones for norms, zeros for biases: a function of seed and tensor name only.

    So they are the same under every layout.
    """

    has_tied_copy = False

    def __init__(self, arch: Architecture, seed: int, std: float = 0.02) -> None:
        self._shapes = hf_tensor_shapes(arch)
        self._seed, self._std = seed, std
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, start: int, stop: int, columns: slice) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        values = self._last[1][start:stop]
        return values if values.dim() == 1 else values[:, columns]

    def row_bytes(self, name: str) -> int:
        return 4 * (self._shapes[name][-1] if len(self._shapes[name]) > 1 else 1)

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)
        return torch.empty(shape).normal_(0.0, self._std, generator=generator)


def every_weight(name: str) -> bool:
    """The base model has all weights of the model; with adapters it has not."""
    return True


def load_hf_weights(
    chunks: Iterable[GPTModel], model_dir: str | Path, arch: Architecture, in_base: InBase = every_weight
) -> None:
    """Set every parameter of this rank's chunks that is `in_base` from a Hugging Face folder.

    Raises:
        CheckpointError: on every rank when any rank meets a missing, truncated, surplus, misshapen or NaN tensor.
    """
    with failing_together(), Files() as files:
        load_weights(chunks, FolderSource(Path(model_dir), arch, files), arch, str(model_dir), in_base)


def random_weights(chunks: Iterable[GPTModel], arch: Architecture, seed: int, in_base: InBase = every_weight) -> None:
    """Set every parameter of this rank's chunks that is `in_base` to random values that do not depend on the layout."""
    load_weights(chunks, RandomSource(arch, seed), arch, "random weights", in_base)


def load_weights(
    chunks: Iterable[GPTModel], source: WeightSource, arch: Architecture, origin: str, in_base: InBase = every_weight
) -> None:
    """Set every parameter of the chunks that is `in_base` from `source`; no collective operation.

    Raises:
        CheckpointError: naming every parameter of which an element is set twice, not at all, or to no finite number.
    """
    tensors = {tensor.megatron: tensor for tensor in megatron_tensors(arch)}
    if arch.tie_word_embeddings:  # the last pipeline stage holds its own copy
        tensors["output_layer.weight"] = tensors[_EMBEDDING]
    faults: list[str] = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not in_base(global_name(chunk, name)):
                continue
            tensor = tensors.get(global_name(chunk, name))
            if tensor is None:
                faults.append(f"{name} has no weights in a Hugging Face model of this family")
                continue
            faults += _set(parameter, tensor, source, arch)
            if name == _EMBEDDING and source.has_tied_copy:
                faults += _compare_tied_copy(parameter, tensor, source, arch)
    if faults:
        shown = "; ".join(faults[:SHOWN_FAULTS])
        more = f" (and {len(faults) - SHOWN_FAULTS} more)" if len(faults) > SHOWN_FAULTS else ""
        raise CheckpointError(
            f"{origin} does not set each weight of the model exactly once: {shown}{more}",
            hint="the weights are damaged or of another model than config.json; fetch or export the folder again",
        )


def global_name(chunk: GPTModel, name: str) -> str:
    """A chunk's parameter name -> the checkpoint's: layers counted over the whole model, TE's names for norms."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match.group(1))].layer_number - 1
    return f"decoder.layers.{layer}.{LOCAL_TO_TE.get(match.group(2), match.group(2))}"


@torch.no_grad()
def _set(parameter: Tensor, tensor: MegatronTensor, source: WeightSource, arch: Architecture) -> list[str]:
    """Fill one parameter. Return what is wrong with it: nothing when every element was set exactly once."""
    tp, rank = _tensor_parallel()
    if tuple(parameter.shape) != slice_shape(tensor, arch, tp):
        return [f"{tensor.megatron} has shape {tuple(parameter.shape)}, not {slice_shape(tensor, arch, tp)}"]
    parameter.fill_(float("nan"))
    faults: dict[str, None] = {}  # in order, each once
    next_row = 0
    for span in row_spans(tensor, arch, tp, rank):
        if span.row != next_row:
            what = "set twice" if span.row < next_row else "set by nothing"
            faults[f"{tensor.megatron}: rows from {min(span.row, next_row)} are {what}"] = None
        for row, values in _blocks(span, source):
            parameter[row : row + len(values)].copy_(values)
            if not _all(torch.isfinite, values):
                faults[f"{span.hf_name} holds NaN or infinite values"] = None
        next_row = span.row + span.rows
    real_rows = _real_vocabulary_rows(parameter, arch, rank) if tensor.kind == "vocab" else len(parameter)
    if next_row == real_rows:
        parameter[real_rows:].zero_()  # padding of the vocabulary
    else:
        faults[f"{tensor.megatron}: {next_row} of {real_rows} rows were set"] = None
    if not faults and not _all(lambda extremes: ~extremes.isnan(), parameter):
        faults[f"{tensor.megatron}: elements were left unset"] = None
    return list(faults)


def _all(holds: Callable[[Tensor], Tensor], values: Tensor) -> bool:
    """Whether a property that NaN and infinity break holds for all values; no temporary of their size is made."""
    return bool(holds(torch.stack(torch.aminmax(values))).all())  # NaN among them is both least and greatest


@torch.no_grad()
def _compare_tied_copy(
    embedding: Tensor, tensor: MegatronTensor, source: WeightSource, arch: Architecture
) -> list[str]:
    """A stored output layer that the embedding is tied to must equal it: else config.json or the weights are wrong."""
    for span in row_spans(tensor, arch, *_tensor_parallel()):
        for row, values in _blocks(span, source, TIED_OUTPUT):
            if not torch.equal(values.to(embedding.dtype), embedding[row : row + len(values)].cpu()):
                return [
                    f"config.json says tie_word_embeddings, but {TIED_OUTPUT} differs from {span.hf_name} (set "
                    "tie_word_embeddings: false if the model has an output layer of its own, else remove the tensor)"
                ]
    return []


def _blocks(span: RowSpan, source: WeightSource, name: str | None = None) -> Iterator[tuple[int, Tensor]]:
    """(row of the parameter, values) over a span, read from the tensor `name` where it is not the span's own."""
    name = name or span.hf_name
    step = max(1, BLOCK_BYTES // source.row_bytes(name))
    for done in range(0, span.rows, step):
        start = span.hf_row + done
        yield span.row + done, source.read(name, start, min(start + step, span.hf_row + span.rows), span.columns)


def _real_vocabulary_rows(parameter: Tensor, arch: Architecture, rank: int) -> int:
    """Rows of this rank's slice of an embedding that are tokens, not padding."""
    return min(max(arch.vocab_size - rank * len(parameter), 0), len(parameter))


def _tensor_parallel() -> tuple[int, int]:
    """(size, rank) of tensor parallelism."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
