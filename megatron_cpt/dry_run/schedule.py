"""Run the real pipeline schedule of one rank forward and backward on the meta device, and count what lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.dry_run.fake_world import META
from megatron_cpt.dry_run.live_bytes import LiveBytes, Message, Part
from megatron_cpt.dry_run.rank import known_storages
from megatron_cpt.forgetting.kl import KlTerm
from megatron_cpt.train.state import TrainState, unwrap
from megatron_cpt.train.step import run_schedule


@dataclass(frozen=True)
class ScheduleRun:
    """What a rank held and exchanged in one step."""

    peak: int  # bytes beyond weights, gradient sums and optimizer
    at_peak: Mapping[Part, int]  # of which
    messages: tuple[Message, ...]  # with other pipeline stages, in order


def enough_micro_batches(micro_batches: int, pp: int) -> int:
    """Return with how many of a step's micro-batches every stage holds all that it ever holds.

    Under 1F1B the first stage is PP micro-batches ahead, under the interleaved schedule less than 2 PP; afterwards the
    same round repeats. The interleaved schedule takes multiples of PP.
    """
    return min(micro_batches, 2 * pp)


def run_step(
    state: TrainState, config: RunConfig, micro_batches: int, *, on_gpu: bool, terms: Sequence[KlTerm] = ()
) -> ScheduleRun:
    """Run `micro_batches` through the schedule of the rank that this process is, with the loss terms of its rank.

    `on_gpu` counts as on a GPU, where an output that was sent to the next stage is freed at once.
    """
    state.model_config.deallocate_pipeline_outputs = on_gpu
    state.model_config.finalize_model_grads_func = _finalize
    live = LiveBytes(known_storages(state, terms))
    hooks = [hook for chunk in state.chunks for hook in _watch_parts(unwrap(chunk), live)]
    batch = _micro_batch(config)
    for chunk in state.chunks:
        chunk.train()
    batches = [batch.copy() for _ in range(micro_batches)]
    with live:
        for term in terms:
            term.before_step(batches)
        run_schedule(state, batches, len(config.data.train), terms, forward_only=False)
    for hook in hooks:
        hook.remove()
    rest = _brought_bytes(batches[0]) * (_micro_batches_of_step(config) - micro_batches)
    at_peak = {**live.at_peak, "activations": live.at_peak["activations"] + rest}
    return ScheduleRun(live.peak + rest, at_peak, tuple(live.messages))


def _brought_bytes(batch: MicroBatch) -> int:
    """Bytes that loss terms keep of a micro-batch from before the step to its end."""
    return sum(tensor.untyped_storage().nbytes() for tensor in batch.get("term_tensors", {}).values())


def _micro_batches_of_step(config: RunConfig) -> int:
    batch = config.batch
    return batch.global_batch_size // (batch.micro_batch_size * config.parallel.data_parallel_size)


def _finalize(model: Any, num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron-Core asks whether the number of tokens is zero, which a tensor without values cannot answer."""
    one = None if num_tokens is None else torch.ones((), dtype=torch.int)
    finalize_model_grads(model, one, **options)


def _watch_parts(model: Any, live: LiveBytes) -> list[Any]:
    """What comes after the last layer is logits."""

    def layers_begin(*unused: Any) -> None:
        live.forward_part = "activations"

    def layers_end(*unused: Any) -> None:
        live.forward_part = "logits"

    hooks = [model.decoder.register_forward_pre_hook(layers_begin)]
    if model.post_process:
        hooks.append(model.decoder.register_forward_hook(layers_end))
    return hooks


def _micro_batch(config: RunConfig) -> MicroBatch:
    samples, length = config.batch.micro_batch_size, config.batch.seq_length
    tokens = torch.empty(samples, length, dtype=torch.int64, device=META)
    batch: MicroBatch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.empty(samples, length, device=META),
        "position_ids": tokens,
        "source": torch.empty(samples, dtype=torch.int64, device=META),
    }
    if config.model.document_attention:  # attention reads where documents begin: here each sample is one
        batch["document_ids"] = torch.zeros(samples, length, dtype=torch.int64)
    return batch
