"""The two factors of one low-rank adapter, as a tensor-parallel rank holds them.

One pair per Hugging Face linear: A [rank, in_features], B [out_features, rank]. Under a column-parallel linear A is
whole on every rank and B cut by rows; under a row-parallel one A is cut by columns and B whole. Between the two lie
`rank` numbers per token, and only they travel; the rank need not divide by the size of tensor parallelism. The output
is in the same parallel state as the linear's own.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_cpt.config.sections.lora import LoraConfig

Kind = Literal["column", "row"]


class Pair(nn.Module):
    """A and B of one linear, of this rank.

    It is called as a module, never by its parts: DistributedDataParallel waits for gathered parameters module by
    module, in front of each call.
    """

    def __init__(self, lora: LoraConfig, shape: tuple[int, int], kind: Kind, like: Tensor, owner: Any) -> None:
        """`shape`: (rows of B, columns of A) on this rank; `like`: of whose dtype and device; `owner`: the linear."""
        super().__init__()
        assert lora.rank is not None
        rows, columns = shape
        self.A = nn.Parameter(torch.empty(lora.rank, columns, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(rows, lora.rank, dtype=like.dtype, device=like.device))
        self.kind: Kind = kind
        self._lora = lora
        self._group, self._sequence_parallel = owner.tp_group, owner.sequence_parallel
        cut, whole, axis = (self.B, self.A, 0) if kind == "column" else (self.A, self.B, 1)
        set_tensor_model_parallel_attributes(cut, True, axis, 1)
        set_tensor_model_parallel_attributes(whole, False, -1, 1)
        # Under sequence parallelism a rank sees a part of the tokens: marked, the gradient is summed, as of the norms.
        whole.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in_features] of this rank -> [s, b, out_features] of this rank, both as of the linear."""
        inner = F.linear(self._dropped(x), self.A)
        if self.kind == "column":
            if self._sequence_parallel:
                inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self._group)
            else:
                inner = copy_to_tensor_model_parallel_region(inner, group=self._group)
        elif self._sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self._group)
        return F.linear(inner * self._lora.scale, self.B)

    def _dropped(self, x: Tensor) -> Tensor:
        """An input that every TP rank has whole gets the same mask on all of them, a part of one its own."""
        if not (self._lora.dropout and self.training):
            return x
        apart = self.kind == "row" or self._sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if apart else contextlib.nullcontext():
            return F.dropout(x, self._lora.dropout, training=True)
