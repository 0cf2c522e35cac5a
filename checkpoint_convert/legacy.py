"""Megatron's legacy `torch` format: `mp_rank_TT[_PPP]/model_optim_rng.pt`, one pickle per model parallel rank.

Each holds `model` (or `model0`, `model1`, ... with virtual pipeline chunks): tensors by the names of
`state_dict()`, layers counted from 0 within the chunk. TransformerEngine and the local layer spec name the
two layer norms differently; both are read. Optimizer and RNG state is left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_convert.archive import PlacedTensor
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
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import (
    LAYER_PREFIX,
    LOCAL_TO_TE,
    MegatronTensor,
    hf_shapes,
    megatron_tensors,
    row_spans,
    slice_shape,
)
from megatron_cpt.errors import ConversionError

if TYPE_CHECKING:  # other formats do without torch
    import torch

FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
NOT_WEIGHTS = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "content_metadata")

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")


def is_legacy(path: Path) -> bool:
    return any(_RANK.match(p.name) and (p / FILE).is_file() for p in path.glob("mp_rank_*"))


@dataclass(frozen=True)
class RankSlice:
    """A tensor parallel rank's part of a Megatron tensor in its file."""

    path: Path
    placed: PlacedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.placed.shape

    @property
    def dtype(self) -> str:
        return self.placed.dtype


Slices = dict[str, dict[int, RankSlice]]  # global Megatron name -> tensor parallel rank -> slice


def read_legacy(path: Path, arch: Architecture, *, trust_pickle: bool = False) -> Weights:
    """Index the weights of all ranks; MismatchError for missing ranks, names, shapes, and unknown names."""
    ranks = _find_ranks(path)
    tp = 1 + max(t for t, _ in ranks)
    slices, tied_output, ignored = _read_ranks(ranks, arch, trust_pickle)
    wanted = {tensor.megatron: tensor for tensor in megatron_tensors(arch)}
    check_names(wanted, slices, path)
    padded = tp * next(iter(slices[EMBEDDING].values())).shape[0]
    if padded < arch.vocab_size:
        raise MismatchError(f"{path}: the embedding has {padded} rows, config.json asks for {arch.vocab_size}")
    tensors: dict[str, StoredTensor] = {}
    copies: list[StoredTensor] = []
    for name, tensor in wanted.items():
        found, more = _hf_tensors(tensor, arch, slices[name], tp, padded, path)
        tensors |= found
        copies += more
    if tied_output:
        found, _ = _hf_tensors(wanted[EMBEDDING], arch, tied_output, tp, padded, path)
        copies += found.values()
    return Weights(tensors, tuple(copies), dict(ignored), padded - arch.vocab_size)


def _find_ranks(path: Path) -> dict[tuple[int, int], Path]:
    """(tp rank, pp rank) -> file; every combination must be there."""
    ranks: dict[tuple[int, int], Path] = {}
    for folder in sorted(path.glob("mp_rank_*")):
        found = _RANK.match(folder.name)
        if found is None:
            continue
        t, p, e = (int(group or 0) for group in found.groups())
        if e:
            raise ConversionError(f"{folder} is a rank of expert parallelism: not supported")
        ranks[t, p] = folder / FILE
    tp, pp = (1 + max(rank[i] for rank in ranks) for i in (0, 1))
    if pp == 1 and any(_RANK.match(file.parent.name).group(2) for file in ranks.values()):  # type: ignore[union-attr]
        raise ConversionError(
            f"{path} holds one pipeline stage, and its folders are named for several", hint="copy the whole checkpoint"
        )
    missing = [(t, p) for p in range(pp) for t in range(tp) if not ranks.get((t, p), path / "?").is_file()]
    if missing:
        names = ", ".join(rank_folder(t, p, pp) for t, p in missing)
        raise ConversionError(f"{path} lacks ranks of TP{tp} x PP{pp}: {names}", hint="copy the whole checkpoint")
    return ranks


def rank_folder(t: int, p: int, pp: int) -> str:
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")


def _read_ranks(
    ranks: dict[tuple[int, int], Path], arch: Architecture, trust: bool
) -> tuple[Slices, dict[int, RankSlice], Counter[str]]:
    """All slices under global names, the last stage's copy of a tied embedding, and what was left out."""
    from checkpoint_convert.state_file import Records, load_state

    slices: Slices = defaultdict(dict)
    tied_output: dict[int, RankSlice] = {}
    ignored: Counter[str] = Counter()
    states = {rank: _chunks(path, load_state(path, trust_pickle=trust), ignored) for rank, path in ranks.items()}
    first_layer = _first_layers({rank: chunks for rank, chunks in states.items() if rank[0] == 0})
    for (t, p), chunks in states.items():
        records = Records(ranks[t, p])
        for v, chunk in enumerate(chunks):
            for name, tensor in chunk.items():
                where = f"{ranks[t, p]}: {name}"
                found = RankSlice(ranks[t, p], records.place(tensor, where))
                key = _global_name(name, first_layer[v, p])
                place = tied_output if key == OUTPUT and arch.tie_word_embeddings else slices[key]
                if t in place:
                    raise MismatchError(f"{where} is {key} of TP rank {t}, which was read already")
                place[t] = found
    return slices, tied_output, ignored


def _chunks(path: Path, state: dict[str, Any], ignored: Counter[str]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each virtual pipeline chunk of a rank's file."""
    import torch

    names = sorted((key for key in state if re.fullmatch(r"model\d*", key)), key=lambda key: int(key[5:] or 0))
    if not names:
        raise ConversionError(f"{path} has no `model`", hint="the distributed optimizer's own file? point at the rank")
    for key in state.keys() - set(names) - set(NOT_WEIGHTS):
        ignored[f"{key} of a rank"] += 1
    chunks = []
    for key in names:
        if "language_model" in state[key]:
            raise ConversionError(f"{path} was written by Megatron's old model classes, not Megatron-Core")
        tensors = {}
        for name, value in state[key].items():
            if name.endswith("_extra_state"):
                ignored["TransformerEngine extra state"] += 1
            elif isinstance(value, torch.Tensor):
                tensors[name.removeprefix("module.")] = value
            else:
                raise MismatchError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        chunks.append(tensors)
    return chunks


def _first_layers(states: dict[tuple[int, int], list[dict[str, torch.Tensor]]]) -> dict[tuple[int, int], int]:
    """(virtual chunk, pp rank) -> global number of its first layer; chunks go round the stages in turn."""
    counts = {}
    for (_, p), chunks in states.items():
        for v, chunk in enumerate(chunks):
            layers = {int(name.split(".")[2]) for name in chunk if name.startswith(LAYER_PREFIX)}
            if layers != set(range(len(layers))):
                raise MismatchError(f"pipeline stage {p}, chunk {v}: layers {sorted(layers)} have a gap")
            counts[v, p] = len(layers)
    first, total = {}, 0
    for key in sorted(counts):
        first[key], total = total, total + counts[key]
    return first


def _global_name(name: str, first_layer: int) -> str:
    if not name.startswith(LAYER_PREFIX):
        return name
    number, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return f"{LAYER_PREFIX}{first_layer + int(number)}.{LOCAL_TO_TE.get(rest, rest)}"


def _hf_tensors(
    tensor: MegatronTensor, arch: Architecture, slices: dict[int, RankSlice], tp: int, padded: int, where: Path
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """The Hugging Face tensors within one Megatron tensor, and the copies that other ranks hold."""
    if sorted(slices) != list(range(tp)):
        raise MismatchError(f"{where}: {tensor.megatron} is on TP ranks {sorted(slices)} of {tp}")
    shape, dtype = slice_shape(tensor, arch, tp, padded), slices[0].dtype
    shapes = hf_shapes(tensor, arch)
    per_rank: dict[int, dict[str, list[Extent]]] = {}
    for rank, part in slices.items():
        check_shape(tensor.megatron, part.shape, shape, part.path)
        check_dtype(tensor.megatron, part.dtype, part.path)
        if part.dtype != dtype:
            raise MismatchError(f"{part.path}: {tensor.megatron} is {part.dtype}, on TP rank 0 it is {dtype}")
        per_rank[rank] = slice_extents(tensor, arch, tp, rank, padded, shape, part)
    if tensor.split_dim is None:
        every = [
            [StoredTensor(n, s, dtype, tuple(per_rank[r][n])) for n, s in shapes.items()] for r in sorted(per_rank)
        ]
        return {t.name: t for t in every[0]}, [t for tensors in every[1:] for t in tensors]
    tensors = {}
    for name, hf_shape in shapes.items():
        extents = tuple(e for rank in sorted(per_rank) for e in per_rank[rank][name])
        tensors[name] = StoredTensor(name, hf_shape, dtype, extents)
        check_cover(tensors[name])
    return tensors, []


def slice_extents(
    tensor: MegatronTensor, arch: Architecture, tp: int, rank: int, padded: int, shape: tuple[int, ...], part: RankSlice
) -> dict[str, list[Extent]]:
    width = shape[1] if len(shape) > 1 else 1
    row_bytes = width * ITEM_BYTES[part.dtype]
    extents: dict[str, list[Extent]] = {name: [] for name in tensor.hf}
    for span in row_spans(tensor, arch, tp, rank, padded):
        offset = part.placed.offset + span.row * row_bytes
        column, record = span.columns.start or 0, part.placed.record
        extents[span.hf_name].append(Extent(span.hf_row, column, span.rows, width, part.path, offset, record))
    return extents
