"""A micro batch: the tensors that one forward and backward pass is given, and how context parallelism cuts them.

Data-parallel peers of other pipeline stages and of other tensor- or context-parallel ranks get the same micro batch,
with whole sequences; a rank takes its part of them in the step.

Shapes: b samples, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor


class MicroBatch(TypedDict):
    """The samples of one micro batch."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s]: the token that follows
    loss_mask: Tensor  # float32 [b, s], 1 where the label counts
    position_ids: Tensor  # int64 [b, s]
    source: NotRequired[Tensor]  # int64 [b]: index of the data source, for the loss per source
    offset_tokens: NotRequired[Tensor]  # int64 [b]: where the sample begins in the stream of its source
    document_ids: NotRequired[Tensor]  # int64 [b, s]: no token attends beyond the place where this changes
    term_tensors: NotRequired[dict[str, Tensor]]  # what loss terms bring along (`train.terms`)


# Axis of the sequence in each tensor. None: the tensor stays whole under context parallelism, because it has no
# sequence or, like the documents, because attention needs all of it. A tensor that no table names is an error.
SEQUENCE_AXES: dict[str, int | None] = {
    "tokens": 1,
    "labels": 1,
    "loss_mask": 1,
    "position_ids": 1,
    "source": None,
    "offset_tokens": None,
    "document_ids": None,
}
_ON_CPU = ("document_ids",)  # attention reads them there


def document_ids(tokens: torch.Tensor, eod_ids: int | torch.Tensor) -> torch.Tensor:
    """Number the documents within each sample: the one that each token belongs to; EOD ends its own.

    Args:
        tokens: int64 [b, s].
        eod_ids: the EOD of all samples, or of each, int64 [b, 1]: every data source may have its own.

    Returns:
        int64 [b, s].
    """
    ends = (tokens == eod_ids).long()
    return ends.cumsum(dim=1) - ends


def on_this_rank(
    batch: MicroBatch, device: torch.device, cp_rank: int, cp_size: int, term_axes: Mapping[str, int | None]
) -> MicroBatch:
    """Return `batch` on `device`, its sequences cut to the part of context-parallel rank `cp_rank` of `cp_size`.

    `term_axes` is the table of the tensors in `batch["term_tensors"]`.

    Raises:
        KeyError: a tensor is in no table, so nobody knows whether it must be cut.
    """

    def take(name: str, tensor: Tensor, axis: int | None) -> Tensor:
        cut = tensor if axis is None else cut_sequence(tensor, axis, cp_rank, cp_size)
        return cut if name in _ON_CPU else cut.to(device, non_blocking=True)

    tensors = {name: tensor for name, tensor in batch.items() if name != "term_tensors"}
    taken: dict[str, object] = {
        name: take(name, cast(Tensor, tensor), SEQUENCE_AXES[name]) for name, tensor in tensors.items()
    }
    if brought := batch.get("term_tensors"):
        taken["term_tensors"] = {name: take(name, tensor, term_axes[name]) for name, tensor in brought.items()}
    return cast(MicroBatch, taken)


def cut_sequence(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    """Return chunks `rank` and 2 * ranks - 1 - rank of the 2 * ranks equal chunks along `axis`, one after the other.

    With causal attention an early and a late chunk together give every rank the same work. Megatron-Core's attention
    and ours (`model.attention`) expect this order.
    """
    if ranks == 1:
        return tensor
    chunks = tensor.chunk(2 * ranks, dim=axis)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=axis)
