"""`batch`: what one optimizer step sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_cpt.budget import BatchSize
from megatron_cpt.config.problems import Problem, divisors
from megatron_cpt.config.section import Positive, Section, Tokens

if TYPE_CHECKING:
    from megatron_cpt.architecture.facts import Architecture
    from megatron_cpt.config.run_config import RunConfig


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

    def problems(self, config: RunConfig, arch: Architecture | None) -> Iterator[Problem]:
        yield from self._ramp_problems(config)
        if arch is not None:
            yield from length_problems(self.seq_length, arch)

    def _ramp_problems(self, config: RunConfig) -> Iterator[Problem]:
        first = self.rampup_from
        if first is None:
            if self.rampup_tokens:
                yield Problem(
                    "batch.rampup_tokens", self.rampup_tokens, "means nothing without rampup_from", "set both or none"
                )
            return
        if not self.rampup_tokens:
            yield Problem("batch.rampup_from", first, "means nothing without rampup_tokens", "set both or none")
        if self.global_batch_size % first:
            yield Problem(
                "batch.rampup_from",
                first,
                f"must divide global_batch_size = {self.global_batch_size}",
                f"one of {divisors(self.global_batch_size)}",
            )
        parallel = config.parallel
        dp, stages = max(1, parallel.data_parallel_size), parallel.pp if parallel.vpp else 1
        per_round = self.micro_batch_size * dp * stages
        if first % per_round:
            yield Problem(
                "batch.rampup_from",
                first,
                f"must be a multiple of {per_round} (micro_batch_size x dp, and x pp for the interleaved schedule)",
                f"{per_round}",
            )


def length_problems(seq_length: int, arch: Architecture) -> Iterator[Problem]:
    """Rules that tie the length of a sequence, in tokens, to the model."""
    if seq_length > arch.max_position_embeddings:
        yield Problem(
            "batch.seq_length",
            seq_length,
            f"exceeds the model's {arch.max_position_embeddings:,} positions",
            f"at most {arch.max_position_embeddings}",
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
