"""What a training step works on: wrapped model chunks and their optimizer, built from config and architecture.

Megatron-Core does the work: Float16Module casts at the pipeline's ends, DistributedDataParallel keeps gradient
sums in fp32 buffers and reduces them over data- and context-parallel ranks, and its (distributed) optimizer keeps
fp32 master weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import Trainable, trainable_of
from megatron_cpt.launch.origin import Origin, resolve_origin
from megatron_cpt.model.build import DTYPES, build_model
from megatron_cpt.model.gpu_options import optimizer_settings
from megatron_cpt.model.load_hf import global_name
from megatron_cpt.model.load_megatron import unset_weights
from megatron_cpt.model.load_origin import load_from_origin
from megatron_cpt.model.spec import LayerModules
from megatron_cpt.peft.adapters import adapted_layer, let_gradients_begin, set_first_values
from megatron_cpt.runtime.adamw import select_adam
from megatron_cpt.runtime.distributed import has_gloo_groups
from megatron_cpt.train.terms import Penalty


@dataclass
class TrainState:
    """This rank's part of the model and of the optimizer."""

    config: RunConfig
    arch: Architecture
    trainable: Trainable
    model_config: TransformerConfig
    chunks: list[DistributedDataParallel]  # one per virtual pipeline chunk
    optimizer: MegatronOptimizer
    adam: str  # whose kernel: "te", "apex" or "torch"
    penalties: tuple[Penalty, ...] = ()  # added to the gradients of every step

    @property
    def device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel within DistributedDataParallel and Float16Module; checkpoints are taken from it."""
    while hasattr(chunk, "module"):
        chunk = cast(torch.nn.Module, chunk.module)
    return chunk


def build_train_state(
    config: RunConfig,
    arch: Architecture,
    *,
    origin: Origin | None = None,
    trainable: Trainable | None = None,
    read_base: bool = True,
    bucket_elements: int | None = None,
    modules: LayerModules | None = None,
) -> TrainState:
    """Build model, weights, gradient buffers and optimizer of this rank; `init_runtime` comes before.

    `origin` and `trainable` are by default what the config says. Without `read_base` the weights stay NaN, for a
    checkpoint to set. `bucket_elements` is the size of the buckets that overlapped communication works in. `modules`
    are the classes of a layer, by default those of `model.attention`.

    Raises:
        ConfigError: the layout or precision lacks what the model needs.
        CheckpointError: the weights are missing, damaged or of another model; on every rank.
    """
    lora = config.lora
    chunks = build_model(config, arch, modules, adapted_layer(lora, arch) if lora.on else None)
    trainable = trainable or trainable_of(config, arch)
    if read_base:
        load_from_origin(chunks, origin or resolve_origin(config.model.init_from), arch, config.seed, trainable.in_base)
        if lora.on:
            set_first_values(chunks, arch, config.seed)
    else:
        unset_weights(chunks)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(trainable.trains(global_name(chunk, name)))
    if lora.on and config.recompute.granularity == "full":
        let_gradients_begin(chunks)
    model_config = chunks[0].config
    wrapped: list[Any] = [Float16Module(model_config, c) for c in chunks] if model_config.bf16 else list(chunks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        bucket_size=bucket_elements,
    )
    ddp = [
        # The later chunks of an interleaved pipeline communicate during the first one's computation anyway.
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(wrapped)
    ]
    adam = select_adam()
    optimizer = get_megatron_optimizer(optimizer_config(config), ddp, use_gloo_process_groups=has_gloo_groups())
    _connect(model_config, ddp, optimizer, config)
    return TrainState(config, arch, trainable, model_config, ddp, optimizer, adam)


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Megatron-Core's optimizer settings; the learning rate is set at every step by the schedule."""
    asked, dtype = config.optimizer, DTYPES[config.precision.dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=asked.lr,
        min_lr=asked.min_lr,
        weight_decay=asked.weight_decay,
        adam_beta1=asked.adam_beta1,
        adam_beta2=asked.adam_beta2,
        adam_eps=asked.adam_eps,
        clip_grad=asked.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **optimizer_settings(config),
    )


def _connect(
    model_config: TransformerConfig,
    ddp: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    config: RunConfig,
) -> None:
    """Tell Megatron-Core's schedules how gradients are scaled, kept apart per micro batch, and finished."""
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in ddp]
        model_config.no_sync_func = no_sync if len(ddp) > 1 else no_sync[0]


@contextlib.contextmanager
def gathered_parameters(state: TrainState) -> Iterator[None]:
    """Within it, every rank holds current parameters: for evaluation and for saving a checkpoint.

    With `overlap_param_gather` the parameters are gathered lazily, by the next training step's forward pass.
    """
    lazy = state.config.parallel.overlap_param_gather
    if lazy:
        for chunk in state.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
    yield
    if lazy:
        for chunk in state.chunks:
            chunk.enable_forward_pre_hook()
