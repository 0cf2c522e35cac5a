"""A loss term whose effect is known exactly, for the parity rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_cpt.data.micro_batch import MicroBatch


@dataclass
class SecondCrossEntropy:
    """`weight` times the cross entropy once more, from labels and a mask that it brings along itself.

    The loss becomes 1 + weight times what it was, and so does the gradient.
    """

    weight: float
    name: str = "second_cross_entropy"
    sequence_axes: ClassVar[dict[str, int | None]] = {"second_labels": 0, "second_mask": 1}

    def before_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        for batch in micro_batches:
            labels_sb = batch["labels"].transpose(0, 1).contiguous()
            batch["term_tensors"] = {"second_labels": labels_sb, "second_mask": batch["loss_mask"].clone()}

    def __call__(self, logits_sbv: Tensor, batch: MicroBatch) -> Tensor:
        own = batch["term_tensors"]
        logits = logits_sbv.float().clone(memory_format=torch.contiguous_format)  # it is overwritten
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, own["second_labels"])
        return self.weight * (losses.transpose(0, 1) * own["second_mask"]).sum()
