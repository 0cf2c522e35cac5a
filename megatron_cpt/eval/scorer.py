"""What an evaluation asks of a model, whichever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scorer(Protocol):
    """A model that says how unlikely it finds tokens. Perplexity is a mean of that."""

    def nll(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihoods in nats, float32 [b, n], of `tokens[:, 1:]` after all before them.

        `tokens` is int64 [b, n + 1]. With `document_ids` (int64 [b, n], one for each of `tokens[:, :-1]`) no token
        attends beyond the place where they change.
        """
        ...


@dataclass(frozen=True)
class Likelihoods:
    """Of tokens that follow given ones. Shapes are [r, k]."""

    log_likelihood: Tensor  # float32, nats; the softmax was computed in float32, without padding of the vocabulary
    is_greedy: Tensor  # bool: no token was likelier; of equally likely ones the smallest id counts


class TaskModel(Protocol):
    """A model that tasks are put to. All tensors that it takes and gives lie on the CPU."""

    def likelihoods(self, inputs: Tensor, first: int, labels: Tensor, rows: Tensor) -> Likelihoods:
        """Return how likely `labels` are after the input tokens `first`, `first` + 1, ... and all before them.

        `inputs` is int64 [b, n], `labels` int64 [r, n - first], and `rows` int64 [r] says which row of inputs each row
        of labels belongs to: answers that differ in their last token share one. Rows may be filled up at their end: no
        token sees a later one.
        """
        ...

    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits of the token after the first `lengths` (int64 [b]) of each row, float32 [b, vocabulary].

        `tokens` is int64 [b, n]; what stands behind a row's length is not looked at.
        """
        ...


def likelihoods_of(logits: Tensor, labels: Tensor, rows: Tensor) -> Likelihoods:
    """Return the likelihoods of `labels`, int64 [r, k], by rows `rows` of `logits` [b, k, vocabulary] of any dtype."""
    logits, places = logits.float(), torch.arange(labels.shape[1], device=labels.device)
    log_likelihood = logits[rows[:, None], places, labels] - logits.logsumexp(-1)[rows]
    return Likelihoods(log_likelihood.cpu(), (logits.argmax(-1)[rows] == labels).cpu())
