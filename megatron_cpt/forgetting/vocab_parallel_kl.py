"""Exact KL divergence between two models whose vocabulary is cut over tensor-parallel ranks, without gathered logits.

Of each token three numbers per model are reduced over the ranks: the largest logit, the sum of exponentials and the
divergence's own sum. With p the model's probabilities, q the reference's, both at temperature T, and D the divergence:

    forward  KL(q || p) = sum q (log q - log p)     gradient by the model's logits / T:  p - q
    reverse  KL(p || q) = sum p (log p - log q)     gradient by the model's logits / T:  p (log p - log q - D)

As p and q sum to 1, sum p (log p - log q) is computed as sum of p (log p - log q) - p + q: no term is negative, so two
models that are near each other do not lose their small divergence in the rounding of the logarithms. The result is
multiplied by T^2, so that its gradient has the same size at every temperature (Hinton et al. 2015,
arXiv:1503.02531, section 2.1). The reference has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.planner.memory import KL_PART_ELEMENTS

PADDING = -1e30  # a logit whose probability is 0, and which can be subtracted without making a NaN
_CPU_PART_ELEMENTS = 2**18  # so few that the copies stay in a processor's cache from pass to pass


def part_rows(logits: Tensor) -> int:
    """Return how many tokens of `logits` [..., rows of the vocabulary] are worked on at once, in fp32."""
    elements = _CPU_PART_ELEMENTS if logits.device.type == "cpu" else KL_PART_ELEMENTS
    return max(1, elements // logits.shape[-1])


def vocab_parallel_kl(
    logits_sbv: Tensor,
    reference_sbv: Tensor,
    *,
    real_rows: int,
    temperature: float = 1.0,
    reverse: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the divergence of each token, [s, b] in fp32, in nats times `temperature` squared.

    Args:
        logits_sbv: the model's, [s, b, rows of the vocabulary on this rank]; not overwritten.
        reference_sbv: the reference's, of the same shape and dtype.
        real_rows: how many of the rows are tokens; the rest is padding and takes no part. May be 0 or less.
        temperature: both logits are divided by it.
        reverse: KL(model || reference) instead of KL(reference || model).
        group: the ranks that hold the vocabulary together, None when this rank holds all of it.
    """
    result: Tensor = _VocabParallelKl.apply(  # type: ignore[no-untyped-call]
        logits_sbv, reference_sbv, real_rows, temperature, reverse, group
    )
    return result


class _VocabParallelKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_sbv: Tensor,
        reference_sbv: Tensor,
        real_rows: int,
        temperature: float,
        reverse: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        divergence_sb = torch.empty(logits_sbv.shape[:2], dtype=torch.float32, device=logits_sbv.device)
        gradient_sbv = torch.empty_like(logits_sbv)  # kept instead of probabilities, in the dtype of the logits
        length = part_rows(logits_sbv)
        for sample in range(logits_sbv.shape[1]):
            for start in range(0, logits_sbv.shape[0], length):
                where = (slice(start, start + length), sample)
                own = logits_sbv[where].to(torch.float32, copy=True)
                other = reference_sbv[where].to(torch.float32, copy=True)
                if real_rows < own.shape[1]:
                    own[:, max(0, real_rows) :] = other[:, max(0, real_rows) :] = PADDING
                if temperature != 1.0:  # else it would be a pass over both for nothing
                    own.div_(temperature)
                    other.div_(temperature)
                divergence, gradient = _divergence(own, other, reverse, group)
                divergence_sb[where] = divergence * temperature**2
                gradient_sbv[where] = gradient if temperature == 1.0 else gradient.mul_(temperature)
        ctx.save_for_backward(gradient_sbv)
        return divergence_sb

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_sbv,) = ctx.saved_tensors
        result = torch.empty_like(gradient_sbv)  # the product in fp32, rounded once
        return torch.mul(gradient_sbv, upstream[0].unsqueeze(-1), out=result), None, None, None, None, None


def _divergence(own: Tensor, other: Tensor, reverse: bool, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the divergence of n tokens, [n], and its gradient by `own`, [n, rows]; both inputs are used up."""
    tops = reduced(torch.stack([own.amax(dim=1), other.amax(dim=1)]), dist.ReduceOp.MAX, group)
    own.sub_(tops[0].unsqueeze(1))
    other.sub_(tops[1].unsqueeze(1))
    sums = torch.stack([own.exp().sum(dim=1), other.exp().sum(dim=1)])
    logs = reduced(sums, dist.ReduceOp.SUM, group).log_()
    q = other.sub_(logs[1].unsqueeze(1)).exp()
    ratio = other.neg_().add_(own.sub_(logs[0].unsqueeze(1)))  # log p - log q
    p = own.exp_()
    if reverse:
        divergence = reduced((p * ratio).sub_(p).add_(q).sum(dim=1), dist.ReduceOp.SUM, group)
        return divergence, p.mul_(ratio.sub_(divergence.unsqueeze(1)))
    divergence = reduced((q * ratio).add_(q).sub_(p).sum(dim=1), dist.ReduceOp.SUM, group).neg_()
    return divergence, p.sub_(q)


def reduced(values: Tensor, operation: Any, group: dist.ProcessGroup | None) -> Tensor:
    """Return `values` reduced over the ranks of `group`, in place."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values
