"""The part of a rank in a checkpoint, as plain facts: which rectangle of which tensor it saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)


class Shard(NamedTuple):
    """A rectangle of a tensor of the checkpoint. Every shape and offset has the rank of the whole tensor.

    An object that is pickled whole (random states) is one element of an array of objects.
    """

    key: str
    dtype: str
    whole: tuple[int, ...]  # shape of the tensor in the checkpoint
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    writes: bool  # others that hold the same rectangle do not write it

    @property
    def elements(self) -> int:
        return volume(self.shape)


def volume(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of `shape`."""
    product = 1
    for size in shape:
        product *= size
    return product


def shards_of(state: dict[str, Any]) -> list[Shard]:
    """Return the shards in a sharded state dict; factories (gate and up of an MLP) are taken apart."""
    return list(_shards(state))


def _shards(state: dict[str, Any]) -> Iterator[Shard]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _shards({"parts": value.build()})
        elif isinstance(value, ShardedTensor):
            yield _of_tensor(value)
        elif isinstance(value, ShardedObject):
            whole, offset = tuple(value.global_shape), tuple(value.global_offset)
            one = (1,) * len(whole)
            yield Shard(value.key, "object", whole, offset, one, is_main_replica(value.replica_id))


def _of_tensor(tensor: ShardedTensor) -> Shard:
    whole, local = tuple(tensor.global_shape), tuple(tensor.local_shape)
    ahead = (1,) * (len(whole) - len(local))  # of the layer, where layers are stacked
    return Shard(
        tensor.key,
        str(tensor.dtype).removeprefix("torch."),
        whole,
        tuple(tensor.global_offset),
        ahead + local,
        is_main_replica(tensor.replica_id),
    )
