"""Hugging Face rows <-> Megatron rows: plain arithmetic, no torch, shared by the converter and the trainer.

`megatron_tensors(arch)` lists every Megatron tensor of a model with the Hugging Face tensors that it is made of.
`row_spans(tensor, arch, tp, rank)` says which rows (and columns) of which of them make the slice of one TP rank,
so that a rank reads only its own bytes:

    for tensor in megatron_tensors(arch):
        target = torch.zeros(slice_shape(tensor, arch, tp, padded_vocab))       # zeros: padding rows stay zero
        for span in row_spans(tensor, arch, tp, rank, padded_vocab):
            rows = hf[span.hf_name][span.hf_row : span.hf_row + span.rows]
            target[span.row : span.row + span.rows] = rows[..., span.columns]

With tp = 1 the slice is the global tensor of a torch_dist checkpoint. Three cases are special:
  qkv    rows interleaved by key/value group: the group's queries, its key, its value, then the next group
  gated  gate above up; a TP rank holds its part of gate above its part of up
  vocab  rows above the true vocabulary are padding, and belong to no Hugging Face tensor
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import family_of
from megatron_cpt.architecture.families.family import Kind, Split, TensorRule
from megatron_cpt.errors import ConversionError

LAYER_PREFIX = "decoder.layers."

# state_dict() names of Megatron-Core's local layer spec and of TransformerEngine's for the same weights.
# (sharded_state_dict(), and so a torch_dist checkpoint, uses TransformerEngine's under both specs.)
LOCAL_TO_TE: dict[str, str] = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class MegatronTensor:
    """One Megatron tensor and its sources. `megatron` counts layers over the whole model, from 0."""

    megatron: str  # e.g. decoder.layers.7.mlp.linear_fc1.weight
    kind: Kind
    hf: tuple[str, ...]
    shape: tuple[int, ...]  # of the whole tensor, without vocabulary padding
    split: Split | None  # what tensor parallelism divides; None: the whole tensor is on every rank
    by_heads: bool  # it can only be divided between whole attention heads
    layer: int | None  # None outside the layers

    @property
    def split_dim(self) -> int | None:
        """The dimension that tensor parallelism divides."""
        return None if self.split is None else ("rows", "columns").index(self.split)

    @property
    def name_in_layer(self) -> str:
        """The name without `decoder.layers.{i}.`; the whole name outside the layers."""
        return self.megatron if self.layer is None else self.megatron.removeprefix(f"{LAYER_PREFIX}{self.layer}.")


@dataclass(frozen=True)
class RowSpan:
    """`rows` rows of a Hugging Face tensor from `hf_row` are rows `row`... of the Megatron slice."""

    hf_name: str
    hf_row: int
    row: int
    rows: int
    columns: slice  # of the Hugging Face tensor; slice(None) for all, and for one-dimensional tensors


def dimensions(arch: Architecture) -> dict[str, int]:
    """Values of the shape symbols used in the families' tables."""
    q = arch.num_attention_heads * arch.head_dim
    return {
        "hidden": arch.hidden_size,
        "q": q,
        "qkv": q + 2 * arch.num_query_groups * arch.head_dim,
        "head_dim": arch.head_dim,
        "ffn": arch.ffn_hidden_size,
        "gated_ffn": 2 * arch.ffn_hidden_size,
        "vocab": arch.vocab_size,
    }


def megatron_tensors(arch: Architecture) -> list[MegatronTensor]:
    """Every Megatron tensor of the model; tied models have no `output_layer.weight`."""
    family, sizes = family_of(arch), dimensions(arch)

    def one(rule: TensorRule, layer: int | None) -> MegatronTensor:
        megatron, hf = ("", "") if layer is None else (f"{LAYER_PREFIX}{layer}.", f"model.layers.{layer}.")
        shape = tuple(sizes[symbol] for symbol in rule.shape)
        names = tuple(hf + name for name in rule.hf)
        return MegatronTensor(megatron + rule.megatron, rule.kind, names, shape, rule.split, rule.by_heads, layer)

    tied = ("lm_head.weight",) if arch.tie_word_embeddings else ()
    embedding, *rest = [rule for rule in family.model if rule.hf != tied]
    layers = [one(rule, layer) for layer in range(arch.num_layers) for rule in family.layer]
    return [one(embedding, None), *layers, *(one(rule, None) for rule in rest)]


def hf_tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by Hugging Face name, with its shape, in the order of the layers."""
    return {name: shape for tensor in megatron_tensors(arch) for name, shape in hf_shapes(tensor, arch).items()}


def hf_shapes(tensor: MegatronTensor, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each Hugging Face tensor that `tensor` is made of."""
    sizes = dimensions(arch)
    kv = arch.num_query_groups * arch.head_dim
    rows = {"qkv": (sizes["q"], kv, kv), "gated": (sizes["ffn"],) * 2}.get(tensor.kind, (tensor.shape[0],))
    return {name: (count, *tensor.shape[1:]) for name, count in zip(tensor.hf, rows, strict=True)}


def slice_shape(
    tensor: MegatronTensor, arch: Architecture, tp: int = 1, padded_vocab: int | None = None, *, by_heads: bool = True
) -> tuple[int, ...]:
    """Shape of one TP rank's slice, with vocabulary padding; ConversionError when it does not divide.

    by_heads: attention must divide by whole heads, as it must for a rank that computes; else rows need only divide.
    """
    shape = list(tensor.shape)
    if tensor.kind == "vocab":
        shape[0] = padded_vocab or arch.padded_vocab_size(tp)
    if tensor.split_dim is None:
        return tuple(shape)
    _check_divides(tensor, arch, tp, shape[tensor.split_dim], by_heads)
    shape[tensor.split_dim] //= tp
    return tuple(shape)


def check_ranks(arch: Architecture, tp: int) -> None:
    """Raise ConversionError unless Megatron-Core can build this model for `tp` ranks."""
    for tensor in megatron_tensors(arch):
        if tensor.layer in (None, 0):
            slice_shape(tensor, arch, tp)


def _check_divides(tensor: MegatronTensor, arch: Architecture, tp: int, size: int, by_heads: bool) -> None:
    """Raise ConversionError unless Megatron-Core can cut this tensor for `tp` ranks."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if by_heads and tensor.kind == "qkv" and groups % tp and tp % groups:
        raise ConversionError(
            f"{tensor.megatron}: tensor parallel size {tp} and {groups} key/value heads do not divide"
        )
    what, count = ("attention heads", heads) if by_heads and tensor.by_heads else ("slices", size)
    what, count = ("ffn rows", arch.ffn_hidden_size) if tensor.kind == "gated" else (what, count)
    if count % tp or size % tp:
        raise ConversionError(f"{tensor.megatron}: {count} {what} do not divide by tensor parallel size {tp}")


def row_spans(
    tensor: MegatronTensor,
    arch: Architecture,
    tp: int = 1,
    rank: int = 0,
    padded_vocab: int | None = None,
    *,
    by_heads: bool = True,
) -> list[RowSpan]:
    """The parts of Hugging Face tensors that make the slice of TP rank `rank`, in ascending Megatron rows."""
    rows, *columns = slice_shape(tensor, arch, tp, padded_vocab, by_heads=by_heads)
    everything = slice(None)
    if tensor.kind == "qkv":
        return list(_qkv_spans(tensor, arch, rows, rank))
    if tensor.kind == "gated":
        half = rows // 2
        return [RowSpan(name, rank * half, i * half, half, everything) for i, name in enumerate(tensor.hf)]
    if tensor.kind == "vocab":
        start = min(rank * rows, arch.vocab_size)
        count = min((rank + 1) * rows, arch.vocab_size) - start
        return [RowSpan(tensor.hf[0], start, 0, count, everything)] if count else []
    if tensor.split == "columns":
        return [RowSpan(tensor.hf[0], 0, 0, rows, slice(rank * columns[0], (rank + 1) * columns[0]))]
    start = rank * rows if tensor.split == "rows" else 0
    return [RowSpan(tensor.hf[0], start, 0, rows, everything)]


def _qkv_spans(tensor: MegatronTensor, arch: Architecture, rows: int, rank: int) -> Iterator[RowSpan]:
    """Rows [rank * rows, (rank + 1) * rows) of the whole; they may cut a group when tp exceeds the groups."""
    d = arch.head_dim
    counts = (arch.num_attention_heads // arch.num_query_groups * d, d, d)
    first, last, row = rank * rows, (rank + 1) * rows, 0
    for group in range(arch.num_query_groups):
        for name, count in zip(tensor.hf, counts, strict=True):
            low, high = max(row, first), min(row + count, last)
            if low < high:
                yield RowSpan(name, group * count + low - row, low - first, high - low, slice(None))
            row += count
