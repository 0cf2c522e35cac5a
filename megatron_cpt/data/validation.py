"""Named held-out sets, cut as `megatron-cpt eval perplexity` cuts them, so that both give the same number.

A set is one stream of tokens in file order, in blocks of `seq_length` inputs; consecutive blocks overlap by one
token, so each token but the first is predicted once. The last block is padded, and its padding is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.data.datasets import Dataset
from megatron_cpt.data.micro_batch import MicroBatch, document_ids


class ValidationSet:
    def __init__(
        self, dataset: Dataset, seq_length: int, max_tokens: int | None = None, *, documents_apart: bool = False
    ) -> None:
        self.name = dataset.name
        self.document_end = dataset.eod_id if documents_apart else None
        self.seq_length = seq_length
        self._stream = open_indexed(dataset.prefix).tokens
        available = len(self._stream) - 1
        self.predicted_tokens = available if max_tokens is None else min(available, max_tokens)
        self.blocks = -(-self.predicted_tokens // seq_length)

    def rounds(self, micro_batch_size: int, dp_size: int) -> int:
        """Micro-batches that every data-parallel rank runs; the last may be all padding on some ranks."""
        return -(-self.blocks // (micro_batch_size * dp_size))

    def micro_batches(self, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[MicroBatch]:
        for round_ in range(self.rounds(micro_batch_size, dp_size)):
            first = (round_ * dp_size + dp_rank) * micro_batch_size
            yield self.read(range(first, first + micro_batch_size))

    def read(self, blocks: Sequence[int]) -> MicroBatch:
        """Return the blocks with these numbers; those behind the last one are all padding."""
        shape = (len(blocks), self.seq_length)
        tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.float32)
        for row, block in enumerate(blocks):
            start = block * self.seq_length
            count = max(0, min(self.seq_length, self.predicted_tokens - start))
            window = self._stream[start : start + count + 1]
            if count:
                tokens[row, :count], labels[row, :count], mask[row, :count] = window[:-1], window[1:], 1.0
        inputs = torch.from_numpy(tokens)
        batch: MicroBatch = {
            "tokens": inputs,
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.arange(self.seq_length).expand(len(blocks), -1).contiguous(),
        }
        if self.document_end is not None:
            batch["document_ids"] = document_ids(inputs, self.document_end)
        return batch
