"""The output layer and the loss, a chunk of the sequence at a time: the logits of all tokens are never held at once.

The logits of 32,768 tokens over a vocabulary of 152,064 rows take 20 GB in fp32, more than the layers of many models.
The forward pass keeps the losses alone; the backward pass computes the logits of one chunk again, and its gradients,
before it goes on to the next (Chen et al., arXiv:1604.06174, on the head). The gradient of the output layer's weight is
summed over the chunks in fp32, whatever the dtype of the model.

Shapes: s this rank's positions under context parallelism, t the tensor-parallel size under sequence parallelism (else
1), b samples, h hidden size. The hidden states are [s / t, b, h]: a chunk of them is `t` spans of the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, weight, labels [b, tokens] -> losses [b, tokens]


def chunked_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_of: LossOf, *, chunk_tokens: int, spans: int
) -> Tensor:
    """Return the loss per token [b, s] in fp32 of hidden states [s / spans, b, h].

    Args:
        hidden: this rank's part of the sequence, after the last norm.
        weight: of the output layer, this rank's rows.
        labels: [b, s].
        loss_of: the output layer and the cross entropy; under sequence parallelism it gathers the hidden states itself.
        chunk_tokens: tokens of the micro-batch whose logits may exist at once; at least one position is taken.
        spans: into how many parts sequence parallelism cuts the positions.
    """
    positions = max(1, chunk_tokens // (labels.shape[0] * spans))
    losses: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, loss_of, positions, spans
    )
    return losses


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_of: LossOf, positions: int, spans: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.loss_of, ctx.positions, ctx.spans = loss_of, positions, spans
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        for begin in range(0, len(hidden), positions):
            part = slice(begin, begin + positions)
            wanted = _spans(labels, spans)[:, :, part]
            found = loss_of(hidden[part], weight, wanted.flatten(1))
            _spans(losses, spans)[:, :, part] = found.view(wanted.shape)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        trains = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trains else None
        leaf = weight.detach().requires_grad_(trains)
        for begin in range(0, len(hidden), ctx.positions):
            part = slice(begin, begin + ctx.positions)
            with torch.enable_grad():
                inputs = hidden[part].detach().requires_grad_()
                losses = ctx.loss_of(inputs, leaf, _spans(labels, ctx.spans)[:, :, part].flatten(1))
            grad_losses = _spans(grads[0], ctx.spans)[:, :, part].reshape(losses.shape).to(losses.dtype)
            found = torch.autograd.grad(losses, [inputs, leaf] if trains else [inputs], grad_losses)
            del losses
            grad_hidden[part] = found[0]
            if grad_weight is not None:
                grad_weight += found[1]
            del found
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _spans(tensor_bs: Tensor, spans: int) -> Tensor:
    """[b, s] -> [b, spans, s / spans], the same memory."""
    return tensor_bs.view(tensor_bs.shape[0], spans, -1)
