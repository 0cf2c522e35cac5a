"""Draw the next token from a model whose vocabulary is cut over tensor-parallel ranks, without gathered logits.

The distribution function is inverted: with u in [0, 1) the token is the first at which the sum of probabilities, in the
order of the vocabulary, exceeds u. One number per token decides, so that the draw is the same under every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.forgetting.vocab_parallel_kl import part_rows


@torch.no_grad()
def sampled_labels(
    logits_sbv: Tensor, uniform_sb: Tensor, *, real_rows: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return a token of each position, int64 [s, b], the same on all ranks of `group`.

    Args:
        logits_sbv: [s, b, rows of the vocabulary on this rank]; not overwritten.
        uniform_sb: numbers in [0, 1), float64 [s, b].
        real_rows: how many of the rows are tokens; the rest is padding. May be 0 or less.
        group: the ranks that hold the vocabulary together, None when this rank holds all of it.
    """
    labels = torch.empty(logits_sbv.shape[:2], dtype=torch.int64, device=logits_sbv.device)
    length = part_rows(logits_sbv)
    for sample in range(logits_sbv.shape[1]):
        for start in range(0, logits_sbv.shape[0], length):
            where = (slice(start, start + length), sample)
            labels[where] = _drawn(logits_sbv[where].float(), uniform_sb[where], real_rows, group)
    return labels


def _drawn(logits: Tensor, uniform: Tensor, real_rows: int, group: dist.ProcessGroup | None) -> Tensor:
    """The tokens of n positions, [n], from logits [n, rows]."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    rows = logits.shape[1]
    top = logits[:, : max(0, min(real_rows, rows))].amax(dim=1) if real_rows > 0 else torch.full_like(uniform, -1e30)
    top = top.to(torch.float32)
    if ranks > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    weights = (logits - top.unsqueeze(1)).exp_()
    weights[:, max(0, real_rows) :] = 0.0
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    totals = [torch.empty_like(uniform) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(totals, cumulative[:, -1].contiguous(), group=group)
    else:
        totals = [cumulative[:, -1]]
    ends = torch.stack(totals).cumsum(dim=0)  # of each rank's part of the line from 0 to the sum
    place = uniform * ends[-1]
    begin = ends[rank - 1] if rank else torch.zeros_like(place)
    held = (begin <= place) & (place < ends[rank])
    index = torch.searchsorted(cumulative, (place - begin).unsqueeze(1), right=True).squeeze(1)
    index = index.clamp_(max=max(0, min(real_rows, rows) - 1))  # where the sums were rounded
    labels = torch.where(held, index + rank * rows, 0)
    if ranks > 1:
        dist.all_reduce(labels, group=group)
    return labels
