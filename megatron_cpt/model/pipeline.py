"""Micro batches through the pipeline schedule that the layout asks for: the one place that calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.data.micro_batch import MicroBatch


def run_pipeline(
    chunks: Sequence[Any], micro_batches: Sequence[MicroBatch], forward_step: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    """Run the micro batches through this rank's `chunks`, one per virtual pipeline chunk; collective.

    Args:
        chunks: the model's parts on this rank.
        micro_batches: at least one, all with tokens of the same shape [samples, tokens].
        forward_step: Megatron-Core's, called with an iterator of micro batches and a chunk.
        forward_only: whether the backward pass is left out.

    Returns:
        What `forward_step` gave for each micro batch on the last pipeline stage; empty on other stages.
    """
    samples, length = micro_batches[0]["tokens"].shape
    iterators = [iter(micro_batches) for _ in chunks]
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=samples,
        forward_only=forward_only,
    )
    return outputs
