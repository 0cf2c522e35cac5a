"""Bytes that live on the meta device from moment to moment, by what they are for, and what stages send each other.

Every operation on meta tensors passes `LiveBytes`. A storage counts from the operation that made it to the moment it
would be freed, as the allocator of a GPU would see it, but for rounding and fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

Part = Literal["activations", "logits", "transient"]
Kind = Literal["send", "recv"]
PARTS: tuple[Part, ...] = ("activations", "logits", "transient")

_KINDS: dict[str, Kind] = {"c10d::send": "send", "c10d::recv_": "recv"}


@dataclass(frozen=True)
class Message:
    """A tensor that a pipeline stage sends or expects."""

    kind: Kind
    peer: int  # the other stage
    shape: tuple[int, ...]
    dtype: torch.dtype


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the size in bytes of each storage of `tensors`, by its identity."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered. `known` are storages that exist before and are counted elsewhere.

    What is made in a backward pass, recomputation included, is transient. In a forward pass it is of the part that
    `forward_part` says at that time.
    """

    def __init__(self, known: Iterable[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.at_peak: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self.forward_part: Part = "activations"
        self.messages: list[Message] = []
        self._live: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._part_of: dict[int, tuple[Part | None, int]] = dict.fromkeys(known, (None, 0))

    @property
    def live(self) -> int:
        """Bytes that live now."""
        return sum(self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._note_message(func.name(), args)
            # Not every torch has each collective for the meta device; the fake backend does nothing with a tensor.
            args, kwargs = tree_map_only(Tensor, _without_elements, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._part_of:
            return
        in_backward = torch._C._current_autograd_node() is not None
        part: Part = "transient" if in_backward else self.forward_part
        size = storage.nbytes()
        self._part_of[key] = (part, size)
        self._live[part] += size
        weakref.finalize(storage, self._freed, key).atexit = False
        if (live := self.live) > self.peak:
            self.peak, self.at_peak = live, dict(self._live)

    def _freed(self, key: int) -> None:
        part, size = self._part_of.pop(key)
        if part is not None:
            self._live[part] -= size

    def _note_message(self, operation: str, args: tuple[Any, ...]) -> None:
        kind = _KINDS.get(operation)
        if kind is not None:
            tensors, _, peer = args[:3]
            self.messages += [Message(kind, peer, tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def _without_elements(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype) if tensor.is_meta else tensor
