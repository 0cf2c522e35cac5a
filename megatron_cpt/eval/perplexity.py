"""Perplexity of a model on a stream of tokens: what is counted, and nothing about models or files.

The documents are packed into one stream as training packs them, each followed by its separator if the
dataset has one. The stream is cut into blocks of `seq_length` inputs; the labels of a block are the same tokens
one place later, so consecutive blocks overlap by one token: every token of the stream but the very first is
predicted exactly once, from at most `seq_length` tokens of its own block. The last block is as short as it
comes. The loss is the sum over all predicted tokens divided by their number (no mean of block means), and the
perplexity is exp(loss), not capped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cpt.console import OnTokens
from megatron_cpt.data.micro_batch import document_ids
from megatron_cpt.errors import CptError, DataError
from megatron_cpt.eval.scorer import Scorer

TOKENS_PER_FORWARD = 1024  # short blocks are batched up to this; the result does not depend on it


@dataclass(frozen=True)
class TokenStream:
    """All documents of a dataset, one after the other."""

    name: str
    tokens: np.ndarray  # 1-D, any integer type
    document_ends: np.ndarray  # 1-D ascending: tokens up to and including document i, empty documents left out
    eod_id: int  # the token that ends a document


@dataclass(frozen=True)
class Perplexity:
    """The outcome; `loss` is in nats per token."""

    loss: float
    tokens: int  # predicted
    documents: int  # that hold at least one of the tokens seen
    seq_length: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def perplexity(
    scorer: Scorer,
    stream: TokenStream,
    seq_length: int,
    max_tokens: int | None = None,
    on_tokens: OnTokens = lambda done, total: None,
    *,
    document_attention: bool = False,
) -> Perplexity:
    """Measure `scorer` on the first `max_tokens` predictions of `stream`; default: on all of it.

    With `document_attention` no token attends beyond its document, as in a run with `model.document_attention`.

    Raises:
        DataError: the stream is too short to predict anything, or its documents cannot be kept apart.
        CptError: the model gave NaN or infinity.
    """
    predicted = len(stream.tokens) - 1 if max_tokens is None else min(len(stream.tokens) - 1, max_tokens)
    if predicted < 1:
        raise DataError(
            f"{stream.name} holds {len(stream.tokens)} token(s): nothing to predict",
            hint="give a dataset or text of at least two tokens",
        )
    if document_attention and not (stream.tokens[stream.document_ends - 1] == stream.eod_id).all():
        raise DataError(
            f"model.document_attention keeps documents apart by their EOD, and not all of {stream.name} have one",
            hint="preprocess the text again with --append-eod",
        )
    nats, done = 0.0, 0
    for blocks in _batches(stream.tokens, predicted, seq_length):
        apart = document_ids(blocks[:, :-1], stream.eod_id) if document_attention else None
        losses = scorer.nll(blocks, apart)
        batch_nats = float(losses.double().sum())
        if not math.isfinite(batch_nats):
            raise CptError(
                f"the model's loss is {batch_nats} on tokens {done:,} to {done + losses.numel():,} of {stream.name}",
                hint="the weights are damaged, or the data was written with another tokenizer",
            )
        nats += batch_nats
        done += losses.numel()
        on_tokens(done, predicted)
    documents = int(np.searchsorted(stream.document_ends, predicted + 1, side="left")) + 1
    return Perplexity(nats / predicted, predicted, documents, seq_length)


def _batches(tokens: np.ndarray, predicted: int, seq_length: int) -> Iterator[torch.Tensor]:
    """Full blocks of seq_length + 1 tokens, several per batch, then the short one that remains."""
    full, rest = divmod(predicted, seq_length)
    per_batch = max(1, TOKENS_PER_FORWARD // seq_length)
    for first in range(0, full, per_batch):
        yield _batch(tokens, first * seq_length, min(per_batch, full - first), seq_length)
    if rest:
        yield _batch(tokens, full * seq_length, 1, rest)


def _batch(tokens: np.ndarray, start: int, blocks: int, length: int) -> torch.Tensor:
    """int64 [blocks, length + 1]: consecutive blocks share one token."""
    window = torch.from_numpy(np.asarray(tokens[start : start + blocks * length + 1]).astype(np.int64))
    return window.unfold(0, length + 1, length).contiguous()
