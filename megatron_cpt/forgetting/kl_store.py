"""The stored targets of one source as arrays, and how the base's logits become targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.forgetting.vocab_parallel_kl import PADDING, part_rows, reduced

_NOTHING_LEFT = 1e-12  # the least probability of all other tokens: below it float16 has no number for the logarithm


class KlStore:
    """Targets on disk, [tokens, k] and [tokens, k + 1]."""

    def __init__(self, ids: Path, log_q: Path, tokens: int, top_k: int, mode: Literal["r", "r+"] = "r") -> None:
        self._ids = np.memmap(ids, np.int32, mode, shape=(tokens, top_k))
        self._log_q = np.memmap(log_q, np.float16, mode, shape=(tokens, top_k + 1))

    def read(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The ids [tokens, k] and log-probabilities [tokens, k + 1] of the tokens from `start` on."""
        where = slice(start, start + tokens)
        return torch.from_numpy(np.array(self._ids[where])), torch.from_numpy(np.array(self._log_q[where]))

    def write(self, positions: Sequence[int] | np.ndarray, ids: Tensor, log_q: Tensor) -> None:
        """Set the targets at these positions of the stream."""
        self._ids[positions] = ids.cpu().numpy()
        self._log_q[positions] = log_q.cpu().numpy()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._ids.flush()
        self._log_q.flush()


@torch.no_grad()
def top_log_probabilities(
    logits_sbv: Tensor,
    top_k: int,
    *,
    first_row: int,
    real_rows: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids [s, b, k] int32 and log-probabilities [s, b, k + 1] float16 of the likeliest tokens and of the rest.

    Args:
        logits_sbv: [s, b, rows of the vocabulary on this rank]; not overwritten.
        top_k: at most the tokens of the vocabulary.
        first_row: the token of this rank's first row.
        real_rows: how many of the rows are tokens; the rest is padding. May be 0 or less.
        temperature: the logits are divided by it.
        group: the ranks that hold the vocabulary together, None when this rank holds all of it.
    """
    shape, device = (*logits_sbv.shape[:2], top_k), logits_sbv.device
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    log_q = torch.empty((*shape[:2], top_k + 1), dtype=torch.float16, device=device)
    length = part_rows(logits_sbv)
    for sample in range(logits_sbv.shape[1]):
        for start in range(0, logits_sbv.shape[0], length):
            where = (slice(start, start + length), sample)
            own = logits_sbv[where].float() / temperature
            own[:, max(0, real_rows) :] = PADDING
            ids[where], log_q[where] = _top(own, top_k, first_row, group)
    return ids, log_q


def _top(own: Tensor, top_k: int, first_row: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The targets of n tokens from this rank's rows of their logits, [n, rows]."""
    top = reduced(own.amax(dim=1), dist.ReduceOp.MAX, group).unsqueeze(1)
    total = reduced((own - top).exp_().sum(dim=1, dtype=torch.float64), dist.ReduceOp.SUM, group).unsqueeze(1)
    values, ids = own.topk(min(top_k, own.shape[1]), dim=1)
    ids = ids + first_row
    if group is not None and dist.get_world_size(group) > 1:
        values, ids = (_gathered(tensor, group) for tensor in (values, ids))
        values, order = values.topk(top_k, dim=1)
        ids = ids.gather(1, order)
    log_q = (values - top).double() - total.log()
    rest = (1 - log_q.exp().sum(dim=1, keepdim=True)).clamp_(min=_NOTHING_LEFT).log_()
    return ids.int(), torch.cat([log_q, rest], dim=1).half()


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=1)
