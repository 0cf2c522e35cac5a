"""`batch`: what one optimizer step sees."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.budget import BatchSize
from megatron_cpt.config.problems import Problem, divisors
from megatron_cpt.config.section import Positive, Section, Sections, Tokens
from megatron_cpt.config.sections.parallel import ParallelConfig


class BatchConfig(Section):
    """What one optimizer step sees."""

    seq_length: Positive = Field(1024, description="Tokens per training sample.")
    micro_batch_size: Positive = Field(1, description="Samples per forward pass of one data-parallel rank.")
    global_batch_size: Positive = Field(32, description="Samples per optimizer step, over all ranks.")
    rampup_from: Positive | None = Field(
        None,
        description="Global batch size at the start; grow it in steps of this size, evenly spaced over rampup_tokens. "
        "global_batch_size must be a multiple of it.",
    )
    rampup_tokens: Tokens = Field(0, description="Tokens from the start of the run to the full global batch size.")

    @property
    def size(self) -> BatchSize:
        """Samples of a step as a function of consumed tokens."""
        return BatchSize(self.global_batch_size, self.rampup_from, self.rampup_tokens)

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        parallel = run[ParallelConfig]
        if parallel.divides_ranks:
            yield from _rank_problems(self, parallel)
        yield from _cut_problems(self.seq_length, parallel)
        yield from _ramp_problems(self, parallel)
        if arch is not None:
            yield from _length_problems(self.seq_length, arch)


def _rank_problems(batch: BatchConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """How the samples of a step divide among the ranks and their micro-batches."""
    dp = parallel.data_parallel_size
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
        yield Problem(
            "batch.global_batch_size",
            batch.global_batch_size,
            "the interleaved schedule needs micro-batches per step "
            f"({batch.global_batch_size // per_round}) to be a multiple of pp = {parallel.pp}",
            f"a multiple of {per_round * parallel.pp}",
        )


def _cut_problems(seq_length: int, parallel: ParallelConfig) -> Iterator[Problem]:
    """How a sequence is cut by context and sequence parallelism."""
    if parallel.cp > 1 and seq_length % (2 * parallel.cp):
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"context parallelism cuts a sequence into 2 x cp = {2 * parallel.cp} chunks",
            f"a multiple of {2 * parallel.cp}",
        )
    if parallel.uses_sequence_parallel and seq_length % (parallel.tp * parallel.cp):
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"sequence parallelism splits each sequence over tp x cp = {parallel.tp * parallel.cp}",
            f"a multiple of {parallel.tp * parallel.cp}, or parallel.sequence_parallel: false",
        )


def _ramp_problems(batch: BatchConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    first = batch.rampup_from
    if first is None:
        if batch.rampup_tokens:
            yield Problem(
                "batch.rampup_tokens", batch.rampup_tokens, "means nothing without rampup_from", "set both or none"
            )
        return
    if not batch.rampup_tokens:
        yield Problem("batch.rampup_from", first, "means nothing without rampup_tokens", "set both or none")
    if batch.global_batch_size % first:
        yield Problem(
            "batch.rampup_from",
            first,
            f"must divide global_batch_size = {batch.global_batch_size}",
            f"one of {divisors(batch.global_batch_size)}",
        )
    per_round = batch.micro_batch_size * max(1, parallel.data_parallel_size) * (parallel.pp if parallel.vpp else 1)
    if first % per_round:
        yield Problem(
            "batch.rampup_from",
            first,
            f"must be a multiple of {per_round} (micro_batch_size x dp, and x pp for the interleaved schedule)",
            f"{per_round}",
        )


def _length_problems(seq_length: int, arch: Architecture) -> Iterator[Problem]:
    """Rules that tie the length of a sequence, in tokens, to the model."""
    if seq_length > arch.positions:
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"exceeds the model's {arch.positions:,} positions",
            f"at most {arch.positions}, or model.rope for more",
        )
    yield from sliding_window_problems(seq_length, arch)


def sliding_window_problems(seq_length: int, arch: Architecture) -> Iterator[Problem]:
    """Refuse a sequence that the model's sliding window would cut: every layer here attends to all of it."""
    if arch.sliding_window is not None and seq_length > arch.sliding_window:
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"exceeds the model's sliding window of {arch.sliding_window:,} tokens, which is not implemented",
            f"at most {arch.sliding_window}, where the window changes nothing",
        )
