"""Hugging Face rows <-> Megatron rows: plain arithmetic, no torch, shared by the converter and the trainer.

`mapping(arch)` lists every Megatron tensor of a model with the Hugging Face tensors that it is made of.
`segments(m, arch, tp, rank)` says which rows (and columns) of which of them make the slice of one TP rank,
so that a rank reads only its own bytes:

    for m in mapping(arch):
        target = torch.zeros(slice_shape(m, arch, tp, padded_vocab))       # zeros: padding rows stay zero
        for s in segments(m, arch, tp, rank, padded_vocab):
            target[s.row : s.row + s.rows] = hf[s.hf_name][s.hf_row : s.hf_row + s.rows][..., s.columns]

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
from megatron_cpt.architecture.families.family import Kind, Row
from megatron_cpt.errors import ConversionError

LAYER_PREFIX = "decoder.layers."

# state_dict() names of Megatron-Core's local layer spec and of TransformerEngine's for the same weights.
# (sharded_state_dict(), and so a torch_dist checkpoint, uses TransformerEngine's under both specs.)
LOCAL_TO_TE: dict[str, str] = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class Mapping:
    """One Megatron tensor and its sources. `megatron` counts layers over the whole model, from 0."""

    megatron: str  # e.g. decoder.layers.7.mlp.linear_fc1.weight
    kind: Kind
    hf: tuple[str, ...]
    shape: tuple[int, ...]  # of the whole tensor, without vocabulary padding
    partition_dim: int | None
    layer: int | None  # None outside the layers

    @property
    def name_in_layer(self) -> str:
        """The name without `decoder.layers.{i}.`; the whole name outside the layers."""
        return self.megatron if self.layer is None else self.megatron.removeprefix(f"{LAYER_PREFIX}{self.layer}.")


@dataclass(frozen=True)
class Segment:
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


def mapping(arch: Architecture) -> list[Mapping]:
    """Every Megatron tensor of the model; tied models have no `output_layer.weight`."""
    family, sizes = family_of(arch), dimensions(arch)

    def one(row: Row, layer: int | None) -> Mapping:
        megatron, hf = ("", "") if layer is None else (f"{LAYER_PREFIX}{layer}.", f"model.layers.{layer}.")
        shape = tuple(sizes[symbol] for symbol in row.shape)
        names = tuple(hf + name for name in row.hf)
        return Mapping(megatron + row.megatron, row.kind, names, shape, row.partition_dim, layer)

    embedding, *rest = [row for row in family.model if not (arch.tie_word_embeddings and row.hf == ("lm_head.weight",))]
    layers = [one(row, layer) for layer in range(arch.num_layers) for row in family.layer]
    return [one(embedding, None), *layers, *(one(row, None) for row in rest)]


def hf_shapes(m: Mapping, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each Hugging Face tensor that `m` is made of."""
    sizes = dimensions(arch)
    kv = arch.num_query_groups * arch.head_dim
    rows = {"qkv": (sizes["q"], kv, kv), "gated": (sizes["ffn"],) * 2}.get(m.kind, (m.shape[0],))
    return {name: (count, *m.shape[1:]) for name, count in zip(m.hf, rows, strict=True)}


def slice_shape(
    m: Mapping, arch: Architecture, tp: int = 1, padded_vocab: int | None = None, *, by_heads: bool = True
) -> tuple[int, ...]:
    """Shape of one TP rank's slice, with vocabulary padding; ConversionError when it does not divide.

    by_heads: attention must divide by whole heads, as it must for a rank that computes; else rows need only divide.
    """
    shape = list(m.shape)
    if m.kind == "vocab":
        shape[0] = padded_vocab or arch.padded_vocab_size(tp)
    if m.partition_dim is None:
        return tuple(shape)
    _check_divides(m, arch, tp, shape[m.partition_dim], by_heads)
    shape[m.partition_dim] //= tp
    return tuple(shape)


def check_ranks(arch: Architecture, tp: int) -> None:
    """Raise ConversionError unless Megatron-Core can build this model for `tp` ranks."""
    for m in mapping(arch):
        if m.layer in (None, 0):
            slice_shape(m, arch, tp)


def _check_divides(m: Mapping, arch: Architecture, tp: int, size: int, by_heads: bool) -> None:
    """Raise ConversionError unless Megatron-Core can cut this tensor for `tp` ranks."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if by_heads and m.kind == "qkv" and groups % tp and tp % groups:
        raise ConversionError(f"{m.megatron}: tensor parallel size {tp} and {groups} key/value heads do not divide")
    is_projection = m.name_in_layer == "self_attention.linear_proj.weight"
    what, count = ("attention heads", heads) if by_heads and (m.kind == "qkv" or is_projection) else ("slices", size)
    what, count = ("ffn rows", arch.ffn_hidden_size) if m.kind == "gated" else (what, count)
    if count % tp or size % tp:
        raise ConversionError(f"{m.megatron}: {count} {what} do not divide by tensor parallel size {tp}")


def segments(
    m: Mapping,
    arch: Architecture,
    tp: int = 1,
    rank: int = 0,
    padded_vocab: int | None = None,
    *,
    by_heads: bool = True,
) -> list[Segment]:
    """The parts of Hugging Face tensors that make the slice of TP rank `rank`, in ascending Megatron rows."""
    rows, *columns = slice_shape(m, arch, tp, padded_vocab, by_heads=by_heads)
    everything = slice(None)
    if m.kind == "qkv":
        return list(_qkv_segments(m, arch, rows, rank))
    if m.kind == "gated":
        half = rows // 2
        return [Segment(name, rank * half, i * half, half, everything) for i, name in enumerate(m.hf)]
    if m.kind == "vocab":
        start = min(rank * rows, arch.vocab_size)
        count = min((rank + 1) * rows, arch.vocab_size) - start
        return [Segment(m.hf[0], start, 0, count, everything)] if count else []
    if m.partition_dim == 1:
        return [Segment(m.hf[0], 0, 0, rows, slice(rank * columns[0], (rank + 1) * columns[0]))]
    start = rank * rows if m.partition_dim == 0 else 0
    return [Segment(m.hf[0], start, 0, rows, everything)]


def _qkv_segments(m: Mapping, arch: Architecture, rows: int, rank: int) -> Iterator[Segment]:
    """Rows [rank * rows, (rank + 1) * rows) of the whole; they may cut a group when tp exceeds the groups."""
    d = arch.head_dim
    counts = (arch.num_attention_heads // arch.num_query_groups * d, d, d)
    first, last, row = rank * rows, (rank + 1) * rows, 0
    for group in range(arch.num_query_groups):
        for name, count in zip(m.hf, counts, strict=True):
            low, high = max(row, first), min(row + count, last)
            if low < high:
                yield Segment(name, group * count + low - row, low - first, high - low, slice(None))
            row += count
