"""The diagonal of a model's Fisher information on a text: how much each weight matters for what the model says of it.

    F = mean over the tokens of (d log p(y) / d theta)^2, with y drawn from the model's own p

The labels are the model's, not the text's: with those it would be the empirical Fisher, which is another thing
(Kunstner et al. 2019, arXiv:1905.12558). Given the text, the labels of a sample are drawn independently and the
expectation of each gradient is 0, so the square of the gradient of a whole sample has the sum over its tokens as its
expectation: one backward pass per sample is enough, and its square is taken before samples are added up. F is per
token, and (theta - theta*)^2 F / 2 summed over the weights is about the divergence per token from the base there.

It runs on bare models through Megatron-Core's schedule, a sample at a time on each data-parallel rank. A gradient is
complete only after what Megatron-Core's `finalize_model_grads` would add up: here over context-parallel ranks too, as
they hold parts of one sample, but not over data-parallel ranks, whose samples differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.micro_batch import MicroBatch, on_this_rank
from megatron_cpt.forgetting.sampled_labels import sampled_labels
from megatron_cpt.model.attention import document_starts
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_megatron import load_megatron_weights
from megatron_cpt.model.owned_parameters import OwnedParameter, checkpoint_name
from megatron_cpt.model.pipeline import run_pipeline

FISHER_PREFIX = "fisher."  # of the keys in a checkpoint, so that none takes the values for weights
_UNIFORM = "fisher_uniform"
_EMBEDDING = ("embedding.word_embeddings.weight", "output_layer.weight")


def for_fisher(config: RunConfig) -> RunConfig:
    """Return `config` as the estimate runs it: without what changes a gradient or needs several samples at once."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"dropout": 0.0}),
            "lora": type(config.lora)(),
            "precision": config.precision.model_copy(update={"fp8": None}),
            "parallel": config.parallel.model_copy(update={"vpp": None}),
        }
    )


def estimate_fisher(
    chunks: Sequence[GPTModel],
    read: Callable[[int], MicroBatch],
    samples: int,
    *,
    seed: int,
    vocab_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Replace each parameter of the bare `chunks` by its Fisher value, fp32; collective. Return the tokens it is from.

    `read` gives a sample by its number, as a micro-batch of one; `seed` is that of the labels.
    """
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    device = next(chunks[0].parameters()).device
    sums = [torch.zeros_like(p, dtype=torch.float32) for chunk in chunks for p in chunk.parameters()]
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    for chunk in chunks:
        chunk.train().requires_grad_(True)
    for first in range(0, samples, ranks):
        number = min(first + rank, samples - 1)
        batch = read(number).copy()
        if first + rank >= samples:  # nothing left for this rank
            batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
        tokens += batch["loss_mask"].sum().to(device)
        batch["term_tensors"] = {_UNIFORM: _uniform(seed, number, batch["tokens"].shape)}
        run_pipeline(chunks, [batch], partial(_forward_step, vocab_size=vocab_size), forward_only=False)
        _add_squares(chunks, sums)
        on_progress(min(first + ranks, samples))
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(tokens, group=group)
    with torch.no_grad():
        for parameter, total in zip((p for chunk in chunks for p in chunk.parameters()), sums, strict=True):
            dist.all_reduce(total, group=group)
            parameter.data = total.div_(tokens)
    return round(float(tokens))


def load_importance(
    config: RunConfig, arch: Architecture, owned: Sequence[OwnedParameter], folder: Path
) -> list[Tensor]:
    """Return the Fisher values in `folder` of the elements that this rank's optimizer updates; collective.

    Raises:
        CheckpointError: on every rank, when they are incomplete or of another model.
    """
    chunks: list[GPTModel] = [chunk.float() for chunk in build_model(config, arch)]
    load_megatron_weights(chunks, folder, prefix=FISHER_PREFIX)
    values = {
        checkpoint_name(chunk, name): parameter.data.view(-1)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }
    return [values[parameter.name][parameter.start : parameter.stop].clone() for parameter in owned]


def _uniform(seed: int, sample: int, shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) that depend on seed and sample alone, float64."""
    generator = torch.Generator().manual_seed((seed << 31) + sample)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


def _forward_step(batches: Iterator[MicroBatch], model: Any, *, vocab_size: int) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron-Core's forward step: logits, and the function that makes the score of drawn labels of them."""
    batch = on_this_rank(
        next(batches),
        next(model.parameters()).device,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        {_UNIFORM: 1},
    )
    documents = document_starts(batch["document_ids"]) if "document_ids" in batch else None
    logits = model(batch["tokens"], batch["position_ids"], documents)
    return logits, partial(_score, model, batch, vocab_size)


def _score(model: Any, batch: MicroBatch, vocab_size: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The negative log-likelihood of drawn labels, summed over the tokens that count."""
    logits_sbv = logits.transpose(0, 1)
    labels_sb = sampled_labels(
        logits_sbv.detach(),
        batch["term_tensors"][_UNIFORM].transpose(0, 1),
        real_rows=vocab_size - parallel_state.get_tensor_model_parallel_rank() * logits_sbv.shape[-1],
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    owned = logits_sbv.clone(memory_format=torch.contiguous_format)  # it is overwritten
    nats = model.compute_language_model_loss(labels_sb.transpose(0, 1).contiguous(), owned)
    mask = batch["loss_mask"]
    total = (nats * mask).sum()
    return total, mask.sum().int(), total.detach()


@torch.no_grad()
def _add_squares(chunks: Sequence[GPTModel], sums: Sequence[Tensor]) -> None:
    """Complete the gradients of one sample, and add their squares to `sums`."""
    parameters = ((chunk, name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters())
    for (chunk, name, parameter), total in zip(parameters, sums, strict=True):
        assert parameter.grad is not None, name
        gradient, parameter.grad = parameter.grad.float(), None
        for group in _groups_with_parts(chunk, name, parameter):
            dist.all_reduce(gradient, group=group)
        total.addcmul_(gradient, gradient)


def _groups_with_parts(chunk: GPTModel, name: str, parameter: Tensor) -> Iterator[dist.ProcessGroup]:
    """The groups whose ranks each have a part of the gradient of the parameter, which they hold alike."""
    settings = chunk.config
    if settings.context_parallel_size > 1:
        yield parallel_state.get_context_parallel_group()
    of_own_tokens = settings.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    of_own_heads = settings.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    if settings.tensor_model_parallel_size > 1 and (of_own_tokens or of_own_heads):
        yield parallel_state.get_tensor_model_parallel_group()
    tied = chunk.share_embeddings_and_output_weights and settings.pipeline_model_parallel_size > 1
    if tied and name in _EMBEDDING:
        yield parallel_state.get_embedding_group()
