"""Precision and memory levers that Megatron-Core takes from TransformerEngine or from a GPU: used there, refused here.

Each is a few settings of Megatron-Core's own configs; none changes how the run is written down.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.model.spec import resolve_attention, transformer_engine_is_usable

_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


def fp8_settings(config: RunConfig) -> dict[str, Any]:
    """For TransformerConfig. ConfigError where TransformerEngine cannot run."""
    if config.precision.fp8 is None:
        return {}
    if resolve_attention(config.model.attention) != "te":
        raise ConfigError(
            f"precision.fp8 = {config.precision.fp8!r} needs TransformerEngine and CUDA, which are not both here",
            hint="leave precision.fp8 out",
        )
    return {"fp8": config.precision.fp8, "fp8_recipe": "tensorwise"}


def optimizer_settings(config: RunConfig) -> dict[str, Any]:
    """For OptimizerConfig. ConfigError where a lever has no GPU or no TransformerEngine to work with."""
    asked = config.optimizer
    settings: dict[str, Any] = {}
    if asked.cpu_offload_ratio > 0.0:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"optimizer.cpu_offload_ratio = {asked.cpu_offload_ratio} relieves a GPU, and there is no GPU here",
                hint="leave it out: on a CPU the optimizer state is in host memory anyway",
            )
        settings |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": asked.cpu_offload_ratio}
    if asked.moments_dtype != "fp32":
        if not transformer_engine_is_usable():
            raise ConfigError(
                f"optimizer.moments_dtype = {asked.moments_dtype!r} needs TransformerEngine's optimizer and CUDA",
                hint="set optimizer.moments_dtype: fp32",
            )
        dtype = _MOMENTS[asked.moments_dtype]
        settings |= {"use_precision_aware_optimizer": True, "exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
    return settings
