"""What an evaluation asks of a model, whichever engine runs it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Scorer(Protocol):
    """A model that says how unlikely it finds tokens. Perplexity, and tasks with given answers, are sums of that."""

    def nll(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihoods in nats, float32 [b, n], of `tokens[:, 1:]` after all before them.

        `tokens` is int64 [b, n + 1]. With `document_ids` (int64 [b, n], one for each of `tokens[:, :-1]`) no token
        attends beyond the place where they change.
        """
        ...
