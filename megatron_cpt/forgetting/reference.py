"""The frozen base model of a run, under the run's own layout: what it would have said to the same tokens.

It runs forward through Megatron-Core's schedule before the step, when all ranks are at the same place, and keeps of
each micro batch the hidden states after its last norm, on the last pipeline stage. The logits are made of them one
micro batch at a time: a vocabulary is many times as wide as a hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.micro_batch import MicroBatch, on_this_rank
from megatron_cpt.launch.origin import Origin
from megatron_cpt.model.attention import document_starts
from megatron_cpt.model.build import DTYPES, build_model
from megatron_cpt.model.load_origin import load_from_origin
from megatron_cpt.model.pipeline import run_pipeline
from megatron_cpt.model.spec import LayerModules


class FrozenReference:
    """This rank's part of a model that is only read. `chunks` are bare: one per virtual pipeline chunk."""

    def __init__(self, chunks: list[GPTModel]) -> None:
        self.chunks = chunks
        for chunk in chunks:
            chunk.requires_grad_(False).eval()

    @torch.no_grad()
    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the hidden states of each micro batch after the last norm, collective over the ranks of a model.

        They are [s, b, hidden], cut as context and sequence parallelism cut them; on ranks other than those of the last
        pipeline stage the list is empty.
        """
        todo = list(micro_batches)
        if not todo:
            return []
        while len(self.chunks) > 1 and len(todo) % parallel_state.get_pipeline_model_parallel_world_size():
            todo.append(todo[-1])  # the interleaved schedule works in rounds of PP
        with _without_output_layer(self.chunks):
            outputs = run_pipeline(self.chunks, todo, _forward_step, forward_only=True)
        return outputs[: len(micro_batches)]

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits [s, b, padded vocabulary / TP] of hidden states, on the last pipeline stage."""
        last = self.chunks[-1]
        tied = last.shared_embedding_or_output_weight() if last.share_embeddings_and_output_weights else None
        logits: Tensor = last.output_layer(hidden_states, weight=tied)[0]
        return logits


def load_reference(
    config: RunConfig, arch: Architecture, origin: Origin, modules: LayerModules | None = None
) -> FrozenReference:
    """Build this rank's part of the reference and load the weights of `origin`; collective.

    Raises:
        CheckpointError: on every rank, when the weights are missing, damaged or of another model.
    """
    chunks = build_reference(config, arch, modules)
    load_from_origin(chunks, origin, arch, config.seed)
    return FrozenReference(chunks)


def build_reference(config: RunConfig, arch: Architecture, modules: LayerModules | None = None) -> list[GPTModel]:
    """Build this rank's part of the reference, its weights not yet set, in the dtype of the run."""
    dtype = DTYPES[config.precision.dtype]
    return [chunk.to(dtype) for chunk in build_model(config, arch, modules)]


def _forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, None]:
    """Megatron-Core's forward step; without a function of the loss it collects the output itself."""
    batch = on_this_rank(
        _bare(next(batches)),
        next(model.parameters()).device,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        {},
    )
    documents = document_starts(batch["document_ids"]) if "document_ids" in batch else None
    return model(batch["tokens"], batch["position_ids"], documents), None


def _bare(batch: MicroBatch) -> MicroBatch:
    """Leave out what terms have brought along."""
    copy = batch.copy()
    copy.pop("term_tensors", None)
    return copy


@contextlib.contextmanager
def _without_output_layer(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Inside, the last chunk returns what its output layer would be given."""
    ends = [chunk for chunk in chunks if chunk.post_process]
    for chunk in ends:
        chunk.post_process = False
    try:
        yield
    finally:
        for chunk in ends:
            chunk.post_process = True
