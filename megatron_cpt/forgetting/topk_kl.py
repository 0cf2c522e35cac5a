"""KL divergence from stored probabilities of the k likeliest tokens and the mass of all others, vocabulary-parallel.

With P and Q the probabilities of the k tokens and, as one outcome more, of the rest together:

    forward  sum Q (log Q - log P)     gradient by a logit / T:  p (1 - Q / P)
    reverse  sum P (log P - log Q)     gradient by a logit / T:  p (log P - log Q - D)

where P and Q are those of the outcome that the token belongs to. It is at most the divergence over the whole vocabulary
(no outcome is told apart that was joined), and equal to it when k is the vocabulary. Otherwise as `vocab_parallel_kl`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.forgetting.vocab_parallel_kl import PADDING, part_rows, reduced

_TINY = 1e-30  # of a probability that is taken the logarithm of


def topk_kl(
    logits_sbv: Tensor,
    ids_sbk: Tensor,
    log_q_sbk: Tensor,
    *,
    first_row: int,
    real_rows: int,
    temperature: float = 1.0,
    reverse: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the divergence of each token, [s, b] in fp32, in nats times `temperature` squared.

    Args:
        logits_sbv: the model's, [s, b, rows of the vocabulary on this rank]; not overwritten.
        ids_sbk: the k tokens, int [s, b, k], counted over the whole vocabulary.
        log_q_sbk: log-probabilities at `temperature`, [s, b, k + 1], the last one that of all other tokens together.
        first_row: the token of this rank's first row.
        real_rows: how many of the rows are tokens; the rest is padding and takes no part. May be 0 or less.
        temperature: the model's logits are divided by it.
        reverse: KL(model || stored) instead of KL(stored || model).
        group: the ranks that hold the vocabulary together, None when this rank holds all of it.
    """
    index = ids_sbk.long() - first_row
    result: Tensor = _TopKKl.apply(  # type: ignore[no-untyped-call]
        logits_sbv, index, log_q_sbk, real_rows, temperature, reverse, group
    )
    return result


class _TopKKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_sbv: Tensor,
        index_sbk: Tensor,
        log_q_sbk: Tensor,
        real_rows: int,
        temperature: float,
        reverse: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        divergence_sb = torch.empty(logits_sbv.shape[:2], dtype=torch.float32, device=logits_sbv.device)
        gradient_sbv = torch.empty_like(logits_sbv)  # in the dtype of the logits
        rows = logits_sbv.shape[2]
        length = part_rows(logits_sbv)
        for sample in range(logits_sbv.shape[1]):
            for start in range(0, logits_sbv.shape[0], length):
                where = (slice(start, start + length), sample)
                index = index_sbk[where]
                # one column more, for the tokens of other ranks
                own = torch.empty(len(index), rows + 1, dtype=torch.float32, device=logits_sbv.device)
                own[:, :rows].copy_(logits_sbv[where])
                own[:, min(rows, max(0, real_rows)) :] = PADDING
                index = torch.where((index >= 0) & (index < rows), index, rows)
                if temperature != 1.0:  # else it would be a pass for nothing
                    own.div_(temperature)
                divergence, gradient = _divergence(own, index, log_q_sbk[where], reverse, group)
                divergence_sb[where] = divergence * temperature**2
                gradient_sbv[where] = gradient[:, :rows] if temperature == 1.0 else gradient[:, :rows].mul_(temperature)
        ctx.save_for_backward(gradient_sbv)
        return divergence_sb

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (gradient_sbv,) = ctx.saved_tensors
        result = torch.empty_like(gradient_sbv)  # the product in fp32, rounded once
        torch.mul(gradient_sbv, upstream[0].unsqueeze(-1), out=result)
        return result, None, None, None, None, None, None


def _divergence(
    own: Tensor, index: Tensor, log_q: Tensor, reverse: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the divergence of n tokens, [n], and its gradient by `own`, [n, rows + 1], which is used up.

    `index` [n, k] is a column of `own`, the last one for a token of another rank; `log_q` is [n, k + 1].
    """
    log_q = log_q.float().log_softmax(dim=1)  # as they were rounded when they were stored
    q = log_q.exp()
    own.sub_(reduced(own.amax(dim=1), dist.ReduceOp.MAX, group).unsqueeze(1))
    weights = own.exp_()
    total = reduced(weights.sum(dim=1), dist.ReduceOp.SUM, group).unsqueeze(1)
    chosen = weights.gather(1, index)
    others = weights.scatter_(1, index, 0.0)
    outcomes = reduced(torch.cat([chosen, others.sum(dim=1, keepdim=True)], dim=1), dist.ReduceOp.SUM, group).div_(
        total
    )
    ratio = outcomes.clamp(min=_TINY).log_() - log_q  # log P - log Q
    if reverse:
        divergence = (outcomes * ratio).sub_(outcomes).add_(q).sum(dim=1)
        pull = ratio.sub_(divergence.unsqueeze(1))
    else:
        divergence = (q * ratio).add_(q).sub_(outcomes).sum(dim=1).neg_()
        pull = 1 - ratio.neg_().exp_()
    listed = outcomes[:, :-1] * pull[:, :-1]
    return divergence, others.mul_(pull[:, -1:] / total).scatter_(1, index, listed)
