"""Which layouts are legal: ranks, sequences, micro batches and the model's sizes against each other.

Megatron-Core notices many of these only after minutes, some as a hang, and one, TP across nodes, never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.schema import ParallelConfig, RunConfig


def divisors(number: int, limit: int = 64) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def stage_layers(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...] | None:
    """Layers of each pipeline stage as Megatron-Core deals them out; None where they do not come out even.

    What the first and the last stage do not take is shared equally by the stages that were not given a number.
    """
    first, last, chunks = parallel.first_stage_layers, parallel.last_stage_layers, parallel.vpp or 1
    if parallel.pp == 1:
        return (num_layers,) if first is None and last is None else None
    middle = parallel.pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if (rest != 0) if middle == 0 else (rest <= 0 or rest % middle):
        return None
    between = (rest // middle,) * middle if middle else ()
    stages = (*(() if first is None else (first,)), *between, *(() if last is None else (last,)))
    return stages if all(layers % chunks == 0 for layers in stages) else None


def layout_problems(config: RunConfig) -> Iterator[Problem]:
    """Rules of the layout alone, whatever the model."""
    yield from _rank_problems(config)
    yield from _pipeline_problems(config.parallel)
    yield from _sequence_problems(config)
    yield from _engine_problems(config)


def _rank_problems(config: RunConfig) -> Iterator[Problem]:
    """How the ranks divide among tp, pp, cp and dp, and the batch among them."""
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
        return
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


def _pipeline_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    """Whether there are stages at all, and chunks within them."""
    if parallel.vpp is not None and parallel.pp < 2:
        yield Problem("parallel.vpp", parallel.vpp, "virtual stages need pp > 1", "leave vpp out or set parallel.pp")
    for name in ("first_stage_layers", "last_stage_layers"):
        layers = getattr(parallel, name)
        if layers is None:
            continue
        if parallel.pp < 2:
            yield Problem(f"parallel.{name}", layers, "needs pp > 1", "leave it out or set parallel.pp")
        elif parallel.vpp and layers % parallel.vpp:
            yield Problem(
                f"parallel.{name}",
                layers,
                f"must divide into vpp = {parallel.vpp} chunks",
                f"a multiple of {parallel.vpp}",
            )


def _sequence_problems(config: RunConfig) -> Iterator[Problem]:
    """How a sequence is cut by context and sequence parallelism."""
    parallel, batch = config.parallel, config.batch
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
    if parallel.cp > 1 and config.model.attention == "unfused":
        yield Problem(
            "model.attention",
            "unfused",
            "computes whole sequences only, and parallel.cp shares one among ranks",
            "auto, sdpa or block_causal; or parallel.cp: 1",
        )


def _engine_problems(config: RunConfig) -> Iterator[Problem]:
    """Switches of the optimizer and of the precision that need one another."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield Problem(
            "parallel.overlap_param_gather",
            True,
            "needs distributed_optimizer and overlap_grad_reduce",
            "switch both on, or this off",
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
    yield from _width_problems(config.parallel, arch)
    yield from _depth_problems(config.parallel, arch.num_layers)
    yield from _length_problems(config.batch.seq_length, arch)


def _width_problems(parallel: ParallelConfig, arch: Architecture) -> Iterator[Problem]:
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


def _depth_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[Problem]:
    """Layers over stages, even or not."""
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    uneven = first is not None or last is not None
    if stage_layers(parallel, num_layers) is not None or any(_pipeline_problems(parallel)):
        return
    if not uneven:
        chunks = parallel.pp * (parallel.vpp or 1)
        shown = "parallel.pp" if parallel.vpp is None else "parallel.vpp"
        legal = _legal_stage_layers(parallel, "last_stage_layers", num_layers)
        yield Problem(
            shown,
            parallel.pp if parallel.vpp is None else parallel.vpp,
            f"pp x vpp = {chunks} must divide the model's {num_layers} layers",
            f"a product among {divisors(num_layers, 128)}"
            + (f"; or parallel.last_stage_layers, one of {legal}" if legal else ""),
        )
        return
    name = "last_stage_layers" if last is not None else "first_stage_layers"
    other = "" if first is None or last is None else f" with first_stage_layers = {first}"
    shared = parallel.pp - (first is not None) - (last is not None)
    rule = (
        f"must leave layers that {shared} other stage{'s' if shared > 1 else ''}"
        + (f" in {parallel.vpp} chunks each" if parallel.vpp else "")
        + " share equally"
        if shared
        else "must be what the first stage leaves"
    )
    legal = _legal_stage_layers(parallel, name, num_layers)
    yield Problem(
        f"parallel.{name}",
        getattr(parallel, name),
        f"of the model's {num_layers} layers{other} it {rule}",
        f"one of {legal}" if legal else "another parallel.pp, or leave it out",
    )


def _legal_stage_layers(parallel: ParallelConfig, name: str, num_layers: int) -> list[int]:
    """Values of `name` that make a legal split of the model, the rest of the layout being as it is."""
    asked = getattr(parallel, name) or num_layers // parallel.pp
    legal = [n for n in range(1, num_layers) if stage_layers(parallel.model_copy(update={name: n}), num_layers)]
    return sorted(sorted(legal, key=lambda n: abs(n - asked))[:8])


def _length_problems(seq_length: int, arch: Architecture) -> Iterator[Problem]:
    if seq_length > arch.max_position_embeddings:
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"exceeds the model's {arch.max_position_embeddings:,} positions",
            f"at most {arch.max_position_embeddings}",
        )
    if arch.sliding_window is not None and seq_length > arch.sliding_window:
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"exceeds the model's sliding window of {arch.sliding_window:,} tokens, which is not implemented",
            f"at most {arch.sliding_window}, where the window changes nothing",
        )
