"""Perplexity of a model on a stream of tokens: what is counted, and nothing about models or files.

The documents are packed into one stream as training packs them, each followed by its separator if the
dataset has one. The stream is cut into blocks of `seq_length` inputs; the labels of a block are the same tokens
one place later, so consecutive blocks overlap by one token: every token of the stream but the very first is
predicted exactly once, from at most `seq_length` tokens of its own block. The last block is as short as it
comes. The loss is the sum over all predicted tokens divided by their number (no mean of block means), and the
perplexity is exp(loss), not capped.

With a `stride` smaller than `seq_length` the windows overlap: each begins `stride` tokens after the one before and only
its last predictions, which no window made before, are counted. So a token is predicted from at least
`seq_length - stride` tokens where there are so many. `stride` = `seq_length` is the plain cut into blocks. Apart by
document, each document is a stream of its own, and its first token is not predicted.
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
    stride: int
    nats: float = 0.0  # of all predicted tokens together

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def bits_per_byte(self, text_bytes: int) -> float | None:
        """Return what the predicted text costs per byte, which compares models of different tokenizers.

        Args:
            text_bytes: UTF-8 bytes of the text whose tokens were predicted.
        """
        return self.nats / math.log(2) / text_bytes if text_bytes else None


def perplexity(
    scorer: Scorer,
    stream: TokenStream,
    seq_length: int,
    max_tokens: int | None = None,
    on_tokens: OnTokens = lambda done, total: None,
    *,
    document_attention: bool = False,
    stride: int | None = None,
    per_document: bool = False,
) -> Perplexity:
    """Measure `scorer` on the first `max_tokens` predictions of `stream`; default: on all of it.

    Args:
        scorer: the model.
        stream: what it is measured on.
        seq_length: tokens of a block, or of a window.
        max_tokens: how many tokens to predict at most.
        on_tokens: told how many are done, of how many.
        document_attention: no token attends beyond its document, as in a run with `model.document_attention`.
        stride: tokens from the beginning of one window to that of the next; default `seq_length`.
        per_document: begin anew with each document instead of reading over their ends.

    Raises:
        DataError: the stream is too short to predict anything, its documents cannot be kept apart, or a stride that
            leaves out tokens.
        CptError: the model gave NaN or infinity.
    """
    stride = seq_length if stride is None else stride
    if not 1 <= stride <= seq_length:
        raise DataError(
            f"a stride of {stride} tokens does not predict each token once from windows of {seq_length}",
            hint=f"1 to {seq_length}",
        )
    parts = _parts(stream, max_tokens, per_document=per_document)
    predicted = sum(part.predicted for part in parts)
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
    for blocks, counted in (pair for part in parts for pair in _windows(part, seq_length, stride)):
        apart = document_ids(blocks[:, :-1], stream.eod_id) if document_attention else None
        losses = scorer.nll(blocks, apart)[:, -counted:]
        batch_nats = float(losses.double().sum())
        if not math.isfinite(batch_nats):
            raise CptError(
                f"the model's loss is {batch_nats} on tokens {done:,} to {done + losses.numel():,} of {stream.name}",
                hint="the weights are damaged, or the data was written with another tokenizer",
            )
        nats += batch_nats
        done += losses.numel()
        on_tokens(done, predicted)
    end = parts[-1].start + parts[-1].predicted + 1
    documents = int(np.searchsorted(stream.document_ends, end, side="left")) + 1
    return Perplexity(nats / predicted, predicted, documents, seq_length, stride, nats)


def predicted_ranges(stream: TokenStream, max_tokens: int | None, *, per_document: bool) -> list[tuple[int, int]]:
    """Return the places [start, end) of the stream's tokens that `perplexity` predicts."""
    parts = _parts(stream, max_tokens, per_document=per_document)
    return [(part.start + 1, part.start + 1 + part.predicted) for part in parts]


@dataclass(frozen=True)
class _Part:
    """Tokens that are read in one go: the first of them is not predicted, and `predicted` of the others are."""

    tokens: np.ndarray  # of the whole stream
    start: int
    predicted: int


def _parts(stream: TokenStream, max_tokens: int | None, *, per_document: bool) -> list[_Part]:
    ends = stream.document_ends if per_document else np.array([len(stream.tokens)])
    parts, start, left = [], 0, len(stream.tokens) if max_tokens is None else max_tokens
    for end in map(int, ends):
        predicted = min(end - start - 1, left)
        if predicted > 0:
            parts.append(_Part(stream.tokens, start, predicted))
            left -= predicted
        start = end
    return parts


def _windows(part: _Part, length: int, stride: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Batches of windows of at most `length` inputs, with how many of each one's last predictions count."""
    first = min(part.predicted, length)
    if stride < length:  # nothing stands before the first window: all of its predictions count
        yield _batch(part, 0, 1, first, stride), first
    done = first if stride < length else 0
    full, rest = divmod(part.predicted - done, stride)
    begin = done - (length - stride)
    per_batch = max(1, TOKENS_PER_FORWARD // length)
    for at in range(0, full, per_batch):
        yield _batch(part, begin + at * stride, min(per_batch, full - at), length, stride), stride
    if rest:
        start = begin + full * stride
        yield _batch(part, start, 1, part.predicted - start, stride), rest


def _batch(part: _Part, start: int, windows: int, length: int, stride: int) -> torch.Tensor:
    """int64 [windows, length + 1]: each window begins `stride` tokens after the one before."""
    start += part.start
    read = torch.from_numpy(
        np.asarray(part.tokens[start : start + (windows - 1) * stride + length + 1]).astype(np.int64)
    )
    return read.unfold(0, length + 1, stride).contiguous()
