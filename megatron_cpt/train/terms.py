"""What is minimised beside the cross entropy: loss terms, of the logits, and penalties, of the parameters alone.

The loss of a step is the cross entropy summed over the tokens that count, plus the terms, divided by the number of
those tokens in the global batch. So a term returns a *sum* over its tokens, on the scale of the cross entropy's sum.

A penalty is part of that mean loss per token. Its gradient is added once, after the gradients of the global batch were
reduced and before their norm is taken, to the fp32 gradients that this rank's optimizer owns. So clipping and the
reported norm see it, and it costs no communication, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.model.owned_parameters import OwnedParameter


class LossTerm(Protocol):
    """One term of the loss.

    `name` is its key in the rows of metrics.jsonl. `sequence_axes` says for each tensor that the term adds to
    `term_tensors` along which axis context parallelism cuts it; None for one that is not cut, because it has no
    sequence or because it was computed for this rank's part already.
    """

    name: str
    sequence_axes: Mapping[str, int | None]

    def before_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Prepare the step on every rank, with whole sequences; may add tensors to `term_tensors` of each.

        Here a frozen reference runs its own forward passes: all ranks are at the same place, outside the schedule.
        """
        ...

    def __call__(self, logits_sbv: Tensor, batch: MicroBatch) -> Tensor:
        """Return the term of one micro batch, a scalar with a gradient; on the last pipeline stage only.

        `logits_sbv` [s, b, padded vocabulary / TP] and `batch` are those of this rank: its part of the sequence under
        context parallelism, its rows of the vocabulary under tensor parallelism. Every tensor-parallel rank returns
        the same value. Padding rows of the vocabulary are included. The logits are a
        transposed view in the dtype of the model, and must not be overwritten.
        """
        ...


class Penalty(Protocol):
    """One penalty. `name` is its key in the rows of metrics.jsonl."""

    name: str

    def add_gradients(self, parameters: Sequence[OwnedParameter]) -> Tensor | None:
        """Add the gradient of the penalty to `gradient` of each parameter, in place; called without autograd.

        Return its value summed over the parameters that are `counted` here, a scalar in fp32 or fp64; None when it is
        not to be reported.

        A parameter that several ranks hold (a norm under tensor parallelism, say) must get the same gradient on each:
        it has to follow from `name`, the range and `values`.
        """
        ...
