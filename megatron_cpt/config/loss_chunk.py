"""How many tokens' logits exist at once on the last pipeline stage: `recompute.loss_chunk_tokens`."""

from __future__ import annotations

from typing import Literal

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig

Asked = int | Literal["auto"] | None

# `auto` leaves logits whole while they are no burden: to compute them twice costs a third of the head's time.
WHOLE_BYTES = 2 * 2**30  # of a micro-batch on a rank, in fp32
CHUNK_BYTES = 2**29
SMALLEST_CHUNK_TOKENS = 128


def loss_chunk_tokens(config: RunConfig, arch: Architecture) -> int | None:
    """Tokens of a micro-batch whose logits exist at once on a rank; None where all do."""
    if config.forgetting.active_kl is not None:  # the divergence reads whole logits
        return None
    tokens = config.batch.micro_batch_size * config.batch.seq_length // config.parallel.cp
    rows = arch.padded_vocab_size(config.parallel.tp) // config.parallel.tp
    return chunk_of(config.recompute.loss_chunk_tokens, tokens, rows)


def chunk_of(asked: Asked, tokens: float, rows: float) -> int | None:
    """The chunk for a micro-batch of `tokens` and a rank's `rows` of the vocabulary; None: the whole."""
    if asked != "auto":
        return asked if asked is not None and asked < tokens else None
    if 4 * tokens * rows <= WHOLE_BYTES:
        return None
    chunk = SMALLEST_CHUNK_TOKENS
    while 2 * chunk * 4 * rows <= CHUNK_BYTES:
        chunk *= 2
    return chunk if chunk < tokens else None
