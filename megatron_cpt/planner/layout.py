"""What memory and time of a step depend on, apart from the model: one flat value that a search can vary cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import LINEAR_NAMES, LinearName
from megatron_cpt.config.loss_chunk import Asked
from megatron_cpt.config.run_config import RunConfig


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs, with the batch of a step and what saves memory."""

    tp: int
    pp: int
    vpp: int | None  # virtual chunks per pipeline stage
    cp: int
    dp: int
    gpus_per_node: int
    micro_batch_size: int  # samples
    micro_batches: int  # per step and data-parallel rank
    seq_length: int  # tokens
    layers_per_stage: tuple[int, ...]
    sequence_parallel: bool
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ()  # of `selective`
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_tensor_parallel: bool = False  # as TransformerEngine's user buffers do; no run of ours does
    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: bool = False
    attention: Literal["te", "sdpa", "block_causal", "unfused"] = "te"
    dropout: float = 0.0
    offload_ratio: float = 0.0  # share of the optimizer state in host memory
    moments_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    lora_rank: int | None = None  # of adapters that are trained while all weights are frozen
    lora_targets: tuple[LinearName, ...] = LINEAR_NAMES
    lora_dropout: float = 0.0
    loss_chunk: Asked = None  # tokens whose logits exist at once, as recompute.loss_chunk_tokens
    reference: bool = False  # a frozen model beside the trained one, for forgetting.kl
    target_tokens: int = 0  # of forgetting.kl.offline_top_k, stored for each token
    penalty_bytes: int = 0  # per parameter that the optimizer updates, for forgetting.ewc

    @classmethod
    def of(cls, config: RunConfig, arch: Architecture) -> Layout:
        """Return the layout of a config that `derive` accepts, with its full batch."""
        parallel, batch, model = config.parallel, config.batch, config.model
        layers = parallel.layers_per_stage(arch.num_layers)
        assert layers is not None, "derive refuses such a config"
        dp = parallel.data_parallel_size
        return cls(
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            cp=parallel.cp,
            dp=dp,
            gpus_per_node=parallel.gpus_per_node,
            micro_batch_size=batch.micro_batch_size,
            micro_batches=batch.global_batch_size // (batch.micro_batch_size * dp),
            seq_length=batch.seq_length,
            layers_per_stage=layers,
            sequence_parallel=parallel.uses_sequence_parallel,
            recompute=config.recompute.granularity,
            recompute_modules=config.recompute.modules if config.recompute.granularity == "selective" else (),
            distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            dtype=config.precision.dtype,
            fp8=config.precision.fp8 is not None,
            attention=_attention(config),
            dropout=model.dropout,
            offload_ratio=config.optimizer.cpu_offload_ratio,
            moments_dtype=config.optimizer.moments_dtype,
            lora_rank=config.lora.rank,
            lora_targets=config.lora.targets,
            lora_dropout=config.lora.dropout,
            loss_chunk=None if config.forgetting.active_kl is not None else config.recompute.loss_chunk_tokens,
            reference=config.forgetting.runs_reference,
            target_tokens=_target_tokens(config),
            penalty_bytes=_penalty_bytes(config),
        )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def chunks(self) -> int:
        """Virtual chunks per stage; 1 is the plain schedule."""
        return self.vpp or 1

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.micro_batch_size * self.micro_batches * self.dp

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    def layers_of(self, stage: int) -> int:
        return self.layers_per_stage[stage]

    def recomputes(self, module: str) -> bool:
        """Whether `selective` recomputes the module; `full` is asked for by `recompute`."""
        return module in self.recompute_modules


def _target_tokens(config: RunConfig) -> int:
    asked = config.forgetting.active_kl
    return 0 if asked is None else asked.offline_top_k or 0


def _penalty_bytes(config: RunConfig) -> int:
    """The base's weight in fp32, and its Fisher value."""
    asked = config.forgetting.active_ewc
    return 0 if asked is None else 4 if asked.folder is None else 8


def _attention(config: RunConfig) -> Literal["te", "sdpa", "block_causal", "unfused"]:
    """What `auto` is on a GPU with TransformerEngine, which adapters go without."""
    if config.model.attention == "auto":
        return "sdpa" if config.lora.on else "te"
    return config.model.attention
