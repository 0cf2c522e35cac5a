"""The distributed optimizer's state in a `fully_reshardable` checkpoint, without gathering or copying it.

Megatron-Core's own way holds the state of the whole stage on every data-parallel rank, several times 12 bytes per
parameter: gathered for a save, and for a load read whole and trimmed. A rank owns a range of each flattened
parameter; in the parameter's own shape such a range is a few boxes (part of a row, whole rows, part of a row), and a
torch_dist checkpoint takes boxes of any size. So every rank saves the boxes of its own range, as views, and loads
them in place. The tensors of the checkpoint are those that Megatron-Core writes and loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size by axis

_STATES = ("param", "exp_avg", "exp_avg_sq")


def optimizer_shards(optimizer: MegatronOptimizer, models: dict[str, Any], sharding: str) -> dict[str, Any]:
    """What `optimizer.sharded_state_dict` gives for saving; `models` are the sharded state dicts of the chunks."""
    inner = _alone(optimizer)
    if sharding != "fully_reshardable" or type(inner) is not DistributedOptimizer:
        state: dict[str, Any] = optimizer.sharded_state_dict(dict(models), metadata=_metadata(sharding))
        return state
    return inner.state_dict() | {"param_state": _param_state(inner, models), "param_state_sharding_type": sharding}


def wanted_optimizer_shards(optimizer: MegatronOptimizer, models: dict[str, Any], sharding: str) -> dict[str, Any]:
    """What `optimizer.sharded_state_dict` gives for loading, but for boxes that are the optimizer's own memory."""
    inner = _alone(optimizer)
    if not _loads_in_place(inner, sharding):
        state: dict[str, Any] = optimizer.sharded_state_dict(
            dict(models), is_loading=True, metadata=_metadata(sharding)
        )
        return state
    inner.load_state_dict(inner.state_dict())  # Megatron-Core's way to allocate the moments before the first step
    return optimizer_shards(optimizer, models, sharding)


def put_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any], models: dict[str, Any]) -> None:
    """Take over what was loaded of `wanted_optimizer_shards`, which is in place already unless the loader copied."""
    inner = _alone(optimizer)
    if _loads_in_place(inner, loaded.get("param_state_sharding_type", "replicated")):
        for number, shards in _param_state(inner, models).items():
            for name, shard in shards.items():
                if (found := loaded["param_state"][number][name]).data_ptr() != shard.data.data_ptr():
                    shard.data.copy_(found.view_as(shard.data))
        loaded = {name: value for name, value in loaded.items() if not name.startswith("param_state")}
    optimizer.load_state_dict(loaded)


def _alone(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer of a chain of one."""
    while isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) == 1:
        optimizer = optimizer.chained_optimizers[0]
    return optimizer


def _loads_in_place(optimizer: MegatronOptimizer, sharding: str) -> TypeGuard[DistributedOptimizer]:
    """Whether the state in memory is what a checkpoint holds: fp32, and not scaled or split in two."""
    if sharding != "fully_reshardable" or type(optimizer) is not DistributedOptimizer:
        return False
    return not optimizer.config.use_precision_aware_optimizer


def _metadata(sharding: str) -> dict[str, str]:
    return {} if sharding == "replicated" else {"distrib_optim_sharding_type": sharding}


def _param_state(optimizer: DistributedOptimizer, models: dict[str, Any]) -> dict[int, dict[str, ShardedTensor]]:
    sharded, _ = extract_sharded_tensors_and_factories(models)
    of_parameter = {base.data: base for base in nested_values(sharded)}
    found: dict[int, dict[str, ShardedTensor]] = {}
    number = 0
    for buffer, by_dtype in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        owned = {
            parameter: ranges["param"]
            for buckets in by_dtype.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            if (owns := owned.get(parameter)) is not None:
                found[number] = _shards(optimizer, parameter, of_parameter[parameter], owns.start, owns.end)
            number += 1
    return found


def _shards(
    optimizer: DistributedOptimizer,
    parameter: torch.nn.Parameter,
    described: ShardedTensor | ShardedTensorFactory,
    start: int,
    end: int,
) -> dict[str, ShardedTensor]:
    """The boxes of elements [start, end) of one parameter's states."""
    group = optimizer.data_parallel_group
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    whole = end - start == parameter.numel() and group.size() == 1
    # Each element is on one data-parallel rank only: what is a replica elsewhere is the original here.
    assert described.replica_id[-1] == group.rank(), (described.key, described.replica_id)
    replica = (*described.replica_id[:-1], 0)
    found = {}
    for name in _STATES:
        flat = states[name].detach().float().flatten()
        assert flat.numel() == end - start, (described.key, flat.numel(), start, end)
        for part, first in _parts(described, parameter, f"optimizer.state.{name}.{described.key}"):
            last = first + part.data.numel()
            low, high = max(start, first), min(end, last)
            if whole:
                data = flat[first:last].view(part.data.shape)
                found[f"{name} {first}"] = replace(part, data=data, replica_id=replica)
                continue
            for offset, size in boxes(tuple(part.data.shape), low - first, high - first):
                elements = torch.Size(size).numel()
                found[f"{name} {low}"] = _boxed(
                    part, offset, flat[low - start : low - start + elements].view(size), replica
                )
                low += elements
    return found


def _parts(
    described: ShardedTensor | ShardedTensorFactory, parameter: torch.nn.Parameter, key: str
) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors of the checkpoint that a parameter is stored as, and where each begins in the flat parameter."""
    blank = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
    if isinstance(described, ShardedTensorFactory):  # gate and up projection of an MLP
        built = list(nested_values({"parts": replace(described, key=key, data=blank).build()}))
    else:
        built = [replace(described, key=key, data=blank, dtype=blank.dtype)]
    for part in built:
        assert part.data.is_contiguous(), part.key
        yield part, part.data.storage_offset()


def _boxed(part: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor, replica: tuple[int, ...]) -> ShardedTensor:
    """The box of `part` at `offset`; sizes are irregular, so there is no grid and no axis is prepended."""
    ahead = part.prepend_axis_num
    data = data.view((1,) * ahead + data.shape)
    return replace(
        part,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=tuple(a + b for a, b in zip(part.global_offset, (0,) * ahead + offset, strict=True)),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=replica,
    )


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Elements [start, end) of a flattened tensor of `shape` as boxes of the tensor, in order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = torch.Size(shape[1:]).numel()
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, end - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, end):
        yield (row, *offset), (1, *size)


def standing_alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that fills its storage, so that Megatron-Core's writer sees no need to copy it.

    What is written while the loop goes on is copied once, by the writer's own staging; tensors on a GPU likewise.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    flat = tensor.detach().view(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape)
