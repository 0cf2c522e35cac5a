"""Core attention back ends that need no TransformerEngine, each behind Megatron-Core's one layer spec.

`SdpaAttention`     torch scaled_dot_product_attention: CPU and GPU, grouped queries, context parallelism,
                    documents kept apart; never builds a mask as large as the square of the sequence on a GPU
`block_causal.py`   the same in blocks of matrix products, faster on a CPU
`UnfusedAttention`  Megatron-Core's matmul-softmax-matmul, the plain reference

The argument `attention_mask` of Megatron-Core's forward carries document boundaries here: None for plain causal
attention, or the rows of `document_starts`, an int64 tensor [documents, 2] of (sample, first token) on the CPU.

Shapes: s sequence on this rank, b samples, h query heads, g key/value heads, d head_dim, n context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def document_starts(document_ids: Tensor) -> Tensor:
    """[b, s] ids that change where a new document begins -> [documents, 2] of (sample, first token), on the CPU."""
    ids = document_ids.cpu()
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins.nonzero()


@dataclass(frozen=True)
class Span:
    """Queries `start`..`stop` of a sample attend causally to the keys from `key_start`, all in global positions."""

    sample: int | None  # None: every sample of the micro batch alike
    start: int
    stop: int
    key_start: int


def causal_spans(start: int, stop: int, documents: Tensor | None, length: int, samples: int) -> list[Span]:
    """Cut the queries `start`..`stop` of sequences of `length` tokens where documents begin."""
    if documents is None:
        return [Span(None, start, stop, 0)]
    spans = []
    for sample in range(samples):
        begins = documents[documents[:, 0] == sample, 1].tolist()
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            if max(begin, start) < min(end, stop):
                spans.append(Span(sample, max(begin, start), min(end, stop), begin))
    return spans


class SdpaAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention, over spans of queries.

    Under context parallelism rank r holds chunks r and 2n-1-r of 2n, so that all ranks have equal work; keys and
    values of the whole sequence are gathered, and the backward pass reduce-scatters their gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]."""
        assert attention_bias is None and packed_seq_params is None
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        if ranks == 1:
            held = [(0, query.shape[0])]
        else:
            key, value = self._whole_sequence(key), self._whole_sequence(value)
            chunk = query.shape[0] // 2
            held = [(first * chunk, (first + 1) * chunk) for first in (rank, 2 * ranks - 1 - rank)]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, sequence, d]
        with self._dropout_generator():
            parts = [self._chunk(q, k, v, attention_mask, start, stop, held) for start, stop in held]
        context = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _chunk(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        start: int,
        stop: int,
        held: list[tuple[int, int]],
    ) -> Tensor:
        """The queries `start`..`stop` (global) of every sample: [b, h, stop - start, d]."""
        local = sum(b - a for a, b in held if b <= start) - start  # global position -> row of q
        spans = causal_spans(start, stop, documents, k.shape[2], q.shape[0])
        if documents is None:
            (span,) = spans
            return self._attend(q[:, :, start + local : stop + local], k[:, :, : span.stop], v[:, :, : span.stop])
        samples: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
        for span in spans:
            assert span.sample is not None
            one, keys = slice(span.sample, span.sample + 1), slice(span.key_start, span.stop)
            part = q[one, :, span.start + local : span.stop + local]
            samples[span.sample].append(self._attend(part, k[one, :, keys], v[one, :, keys]))
        return torch.cat([torch.cat(parts, dim=2) for parts in samples])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last query sees every key, the one before it one less, and so on."""
        square = q.shape[2] == k.shape[2]
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if square else causal_lower_right(q.shape[2], k.shape[2]),
            is_causal=square,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _whole_sequence(self, tensor: Tensor) -> Tensor:
        """[s, b, g, d] of this rank -> [n * s, b, g, d] of all ranks, in the order of the sequence."""
        ranks = self.cp_group.size()
        gathered = tensor_parallel.gather_from_sequence_parallel_region(tensor, group=self.cp_group)
        chunks = gathered.chunk(2 * ranks)  # rank 0's two, rank 1's two, ...
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    def _dropout_generator(self) -> Any:
        """Tensor-parallel ranks hold different heads, so each draws its own dropout."""
        if self.dropout == 0.0 or self.config.sequence_parallel:  # sequence parallelism has forked it already
            return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()
        return tensor_parallel.get_cuda_rng_tracker().fork()


class UnfusedAttention(DotProductAttention):
    """Megatron-Core's unfused attention; documents are kept apart by a dense mask [b, 1, s, s]."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attention_mask is not None:
            attention_mask = _dense_mask(attention_mask, query.shape[1], query.shape[0]).to(query.device)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)


def _dense_mask(documents: Tensor, samples: int, length: int) -> Tensor:
    """True where a query must not look: later tokens and other documents. [b, 1, s, s]."""
    begins = torch.zeros(samples, length, dtype=torch.int64)
    begins[documents[:, 0], documents[:, 1]] = 1
    ids = begins.cumsum(1)
    other = ids[:, :, None] != ids[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (other | later)[:, None]
