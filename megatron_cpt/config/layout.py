"""Which layouts are legal: ranks, sequences, micro batches and the model's sizes against each other.

Megatron-Core notices many of these only after minutes, some as a hang, and one, TP across nodes, never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_cpt.config.architecture import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.schema import RunConfig


def divisors(number: int, limit: int = 64) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def layout_problems(config: RunConfig) -> Iterator[Problem]:
    """Rules of the layout alone, whatever the model."""
    parallel, batch = config.parallel, config.batch
    world_size = parallel.nodes * parallel.gpus_per_node
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if parallel.gpus_per_node % parallel.tp:
        yield Problem(
            "parallel.tp",
            parallel.tp,
            f"must divide gpus_per_node = {parallel.gpus_per_node}: tensor parallelism "
            "across nodes is bound by the network",
            f"one of {divisors(parallel.gpus_per_node)}",
        )
    if world_size % model_ranks:
        yield Problem(
            "parallel",
            None,
            f"tp x pp x cp = {parallel.tp} x {parallel.pp} x {parallel.cp} = {model_ranks} must divide "
            f"nodes x gpus_per_node = {parallel.nodes} x {parallel.gpus_per_node} = {world_size}",
            f"choose a product among {divisors(world_size, world_size)}",
        )
    else:
        dp = world_size // model_ranks
        per_round = batch.micro_batch_size * dp
        if batch.global_batch_size % per_round:
            low = batch.global_batch_size // per_round * per_round
            yield Problem(
                "batch.global_batch_size",
                batch.global_batch_size,
                f"must be a multiple of micro_batch_size x dp = {batch.micro_batch_size} x {dp} = {per_round}",
                f"{low} or {low + per_round}" if low else str(per_round),
            )
        elif parallel.vpp and (batch.global_batch_size // per_round) % parallel.pp:
            accumulation = batch.global_batch_size // per_round
            yield Problem(
                "batch.global_batch_size",
                batch.global_batch_size,
                "the interleaved schedule needs micro-batches per step "
                f"({accumulation}) to be a multiple of pp = {parallel.pp}",
                f"a multiple of {per_round * parallel.pp}",
            )
    if parallel.vpp is not None and parallel.pp < 2:
        yield Problem("parallel.vpp", parallel.vpp, "virtual stages need pp > 1", "leave vpp out or set parallel.pp")
    if parallel.cp > 1 and batch.seq_length % (2 * parallel.cp):
        yield Problem(
            "batch.seq_length",
            batch.seq_length,
            f"context parallelism cuts a sequence into 2 x cp = {2 * parallel.cp} chunks",
            f"a multiple of {2 * parallel.cp}",
        )
    wants_sp = parallel.sequence_parallel is True or (parallel.sequence_parallel is None and parallel.tp > 1)
    if wants_sp and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", True, "needs tp > 1", "leave it out")
    if wants_sp and batch.seq_length % (parallel.tp * parallel.cp):
        yield Problem(
            "batch.seq_length",
            batch.seq_length,
            f"sequence parallelism splits each sequence over tp x cp = {parallel.tp * parallel.cp}",
            f"a multiple of {parallel.tp * parallel.cp}, or parallel.sequence_parallel: false",
        )
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield Problem(
            "parallel.overlap_param_gather",
            True,
            "needs distributed_optimizer and overlap_grad_reduce",
            "switch both on, or this off",
        )
    if parallel.cp > 1 and config.model.attention == "unfused":
        yield Problem(
            "model.attention",
            "unfused",
            "computes whole sequences only, and parallel.cp shares one among ranks",
            "auto, sdpa or block_causal; or parallel.cp: 1",
        )
    if config.precision.fp8 is not None and (
        config.model.attention not in ("auto", "te") or config.precision.dtype != "bf16"
    ):
        yield Problem(
            "precision.fp8",
            config.precision.fp8,
            "is TransformerEngine's, around bf16 weights",
            "model.attention: auto or te and precision.dtype: bf16; or leave fp8 out",
        )
    if config.optimizer.moments_dtype != "fp32" and not parallel.distributed_optimizer:
        yield Problem(
            "optimizer.moments_dtype",
            config.optimizer.moments_dtype,
            "needs the distributed optimizer",
            "parallel.distributed_optimizer: true, or fp32",
        )


def model_problems(config: RunConfig, arch: Architecture) -> Iterator[Problem]:
    """Rules that tie the layout to the model."""
    parallel, batch = config.parallel, config.batch
    legal_tp = divisors(math.gcd(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size))
    for what, count in (
        ("attention heads", arch.num_attention_heads),
        ("key/value heads", arch.num_query_groups),
        ("MLP rows", arch.ffn_hidden_size),
    ):
        if count % parallel.tp:
            yield Problem(
                "parallel.tp",
                parallel.tp,
                f"must divide the model's {count} {what}",
                f"one of {legal_tp}",
            )
    chunks = parallel.pp * (parallel.vpp or 1)
    if arch.num_layers % chunks:
        shown = "parallel.pp" if parallel.vpp is None else "parallel.vpp"
        yield Problem(
            shown,
            parallel.pp if parallel.vpp is None else parallel.vpp,
            f"pp x vpp = {chunks} must divide the model's {arch.num_layers} layers",
            f"a product among {divisors(arch.num_layers, 128)}",
        )
    if batch.seq_length > arch.max_position_embeddings:
        yield Problem(
            "batch.seq_length",
            batch.seq_length,
            f"exceeds the model's {arch.max_position_embeddings:,} positions",
            f"at most {arch.max_position_embeddings}",
        )
    if arch.sliding_window is not None and batch.seq_length > arch.sliding_window:
        yield Problem(
            "batch.seq_length",
            batch.seq_length,
            f"exceeds the model's sliding window of {arch.sliding_window:,} tokens, which is not implemented",
            f"at most {arch.sliding_window}, where the window changes nothing",
        )
