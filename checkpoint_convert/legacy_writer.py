"""Plan a legacy Megatron checkpoint: what `state_dict()` of each tensor x pipeline rank would hold."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert.archive import PlacedTensor
from checkpoint_convert.checkpoint import Extent, StoredTensor
from checkpoint_convert.legacy import EMBEDDING, FILE, OUTPUT, TRACKER, RankSlice, rank_folder, slice_extents
from checkpoint_convert.megatron_args import megatron_args, tensor_dtype
from checkpoint_convert.state_file import fake_tensor, hollow_state
from checkpoint_convert.target import Target
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import (
    LAYER_PREFIX,
    LOCAL_TO_TE,
    MegatronTensor,
    hf_shapes,
    megatron_tensors,
    slice_shape,
)
from megatron_cpt.errors import ConversionError

TE_TO_LOCAL = {te: local for local, te in LOCAL_TO_TE.items()}
EXTRA_STATE_MODULES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def plan_legacy(
    folder: Path,
    arch: Architecture,
    dtypes: dict[str, str],
    *,
    tp: int,
    pp: int,
    vpp: int | None,
    iteration: int,
    padded: int,
    local_names: bool,
    gammas_less_one: bool = False,
) -> Target:
    """One file per rank under `folder`/iter_XXXXXXX, and the tracker file beside it; `padded` rows of vocabulary."""
    chunks = vpp or 1
    if arch.num_layers % (pp * chunks):
        raise ConversionError(f"{arch.num_layers} layers do not divide into {pp} stages x {chunks} virtual chunks")
    target = Target(folder)
    args = megatron_args(arch, dtypes, tp, pp, vpp, iteration, gammas_less_one)
    args.padded_vocab_size = padded
    places: dict[str, list[Extent]] = defaultdict(list)
    for p in range(pp):
        owned = [_stage(arch, p, pp, v, chunks) for v in range(chunks)]
        for t in range(tp):
            path = folder / f"iter_{iteration:07d}" / rank_folder(t, p, pp) / FILE
            names = [f"model{v}" if vpp else "model" for v in range(chunks)]
            state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
            for name, maps in zip(names, owned, strict=True):
                state[name] = _hollow_chunk(maps, arch, dtypes, tp, padded, local_names)
            size, skeleton, offsets = hollow_state(state, FILE)
            target.add_file(path, size)
            target.skeleton += [(path, offset, data) for offset, data in skeleton]
            for name, maps in zip(names, owned, strict=True):
                for local, tensor in maps.items():
                    shape = slice_shape(tensor, arch, tp, padded)
                    offset = offsets[name, _local_name(local, local_names)]
                    dtype = tensor_dtype(tensor, dtypes)
                    part = RankSlice(path, PlacedTensor(None, offset, shape, dtype))
                    for hf_name, extents in slice_extents(tensor, arch, tp, t, padded, shape, part).items():
                        places[hf_name] += extents
    for tensor in megatron_tensors(arch):
        for hf_name, hf_shape in hf_shapes(tensor, arch).items():
            target.tensors[hf_name] = StoredTensor(hf_name, hf_shape, dtypes[hf_name], tuple(places[hf_name]))
    target.small_files[folder / TRACKER] = str(iteration).encode()
    return target


def _stage(arch: Architecture, p: int, pp: int, v: int, chunks: int) -> dict[str, MegatronTensor]:
    """Name within the chunk -> mapping, for virtual chunk `v` of pipeline stage `p`."""
    per_chunk = arch.num_layers // (pp * chunks)
    first = (v * pp + p) * per_chunk
    is_first, is_last = v == p == 0, (v, p) == (chunks - 1, pp - 1)
    owned: dict[str, MegatronTensor] = {}
    for tensor in megatron_tensors(arch):
        if tensor.layer is not None and first <= tensor.layer < first + per_chunk:
            owned[f"{LAYER_PREFIX}{tensor.layer - first}.{tensor.name_in_layer}"] = tensor
        elif tensor.megatron == EMBEDDING and is_first:
            owned[EMBEDDING] = tensor
        if tensor.megatron == EMBEDDING and is_last and not is_first and arch.tie_word_embeddings:
            owned[OUTPUT] = tensor  # the last stage computes logits with its own copy
        elif tensor.layer is None and tensor.megatron != EMBEDDING and is_last:
            owned[tensor.megatron] = tensor
    return owned


def _local_name(name: str, local_names: bool) -> str:
    if not local_names or not name.startswith(LAYER_PREFIX):
        return name
    prefix, rest = ".".join(name.split(".")[:3]) + ".", ".".join(name.split(".")[3:])
    return prefix + TE_TO_LOCAL.get(rest, rest)


def _hollow_chunk(
    maps: dict[str, MegatronTensor], arch: Architecture, dtypes: dict[str, str], tp: int, padded: int, local_names: bool
) -> dict[str, torch.Tensor | None]:
    """A `state_dict()` of fake tensors; the empty extra states are what Megatron's linears save."""
    chunk: dict[str, torch.Tensor | None] = {}
    for name, tensor in maps.items():
        chunk[_local_name(name, local_names)] = fake_tensor(
            slice_shape(tensor, arch, tp, padded), tensor_dtype(tensor, dtypes)
        )
        for module in EXTRA_STATE_MODULES:
            if tensor.name_in_layer == f"{module}.weight":
                chunk[name.removesuffix("weight") + "_extra_state"] = None
    return chunk
