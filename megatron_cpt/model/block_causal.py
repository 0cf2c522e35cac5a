"""Causal attention in blocks of matrix products: what is fastest on a CPU, whose flash backward is slow in torch.

Queries are taken in blocks of `BLOCK` rows; a block meets only the keys that it may see, so half of the products of
plain attention are never made. The query heads of a key/value group are stacked into rows, so that a group is one
product. As in FlashAttention (Dao et al., arXiv:2205.14135) the probabilities are not kept but computed again in the
backward pass: memory stays linear in the sequence. Scores are in the dtype of the model, softmax sums in fp32.

Shapes: n samples times key/value groups, r query heads per group, s queries, t >= s keys, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.model.attention import SdpaAttention

BLOCK = 64  # rows of queries; 64 was the fastest of 64, 128 and 256 at 512 to 2048 tokens


class BlockCausalAttention(SdpaAttention):
    """`SdpaAttention` with its kernel replaced; dropout needs the other."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training and self.dropout > 0.0:
            return super()._attend(q, k, v)
        samples, heads, queries, d = q.shape
        groups, keys = k.shape[1:3]
        grouped = q.reshape(samples * groups, heads // groups, queries, d)
        k, v = (tensor.reshape(samples * groups, keys, d) for tensor in (k, v))
        scale = d**-0.5 if self.softmax_scale is None else self.softmax_scale
        context: Tensor = _BlockCausal.apply(grouped, k, v, scale)  # type: ignore[no-untyped-call]
        return context.view(samples, heads, queries, d)


class _BlockCausal(torch.autograd.Function):
    """q [n, r, s, d], k and v [n, t, d] -> [n, r, s, d]; the last query sees every key."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        context = torch.empty_like(q)
        for rows, seen in _blocks(q, k):
            probabilities = _probabilities(q[:, :, rows], k[:, :seen], scale)
            context[:, :, rows] = torch.bmm(probabilities, v[:, :seen]).view_as(context[:, :, rows])
        ctx.save_for_backward(q, k, v, context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, context = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k, v))
        correction = (grad.float() * context.float()).sum(-1, keepdim=True).to(q.dtype)  # sum over keys of dP * P
        for rows, seen in _blocks(q, k):
            grad_rows, q_rows = _stack(grad[:, :, rows]), _stack(q[:, :, rows])
            probabilities = _probabilities(q[:, :, rows], k[:, :seen], ctx.scale)
            grad_v[:, :seen] += torch.bmm(probabilities.transpose(1, 2), grad_rows)
            grad_scores = torch.bmm(grad_rows, v[:, :seen].transpose(1, 2))
            grad_scores.sub_(_stack(correction[:, :, rows])).mul_(probabilities).mul_(ctx.scale)
            grad_q[:, :, rows] = torch.bmm(grad_scores, k[:, :seen]).view_as(grad_q[:, :, rows])
            grad_k[:, :seen] += torch.bmm(grad_scores.transpose(1, 2), q_rows)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """(rows of queries, number of keys that the last of them sees)."""
    queries, keys = q.shape[2], k.shape[1]
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield slice(start, stop), keys - queries + stop


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [n, r, m, d], k [n, seen, d] -> [n, r * m, seen], where query i sees all keys but the last m - 1 - i."""
    (n, r, m, _), seen = q.shape, k.shape[1]
    scores = torch.bmm(_stack(q * scale), k.transpose(1, 2))
    later = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
    scores.view(n, r, m, seen)[..., seen - m :].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, dim=-1)


def _stack(tensor: Tensor) -> Tensor:
    """[n, r, m, x] -> [n, r * m, x]."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
