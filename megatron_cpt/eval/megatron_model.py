"""Score token blocks with Megatron-Core itself, from a torch_dist checkpoint of any layout, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cpt.config.architecture import Architecture
from megatron_cpt.config.load import build_config
from megatron_cpt.eval.perplexity import LoadedModel
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

PRECISION = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


def load_megatron_model(checkpoint: Path, arch: Architecture) -> LoadedModel:
    """Build the model of `arch` without parallelism and set its weights from the torch_dist folder `checkpoint`.

    Raises:
        CheckpointError: the checkpoint is incomplete or of another model.
    """
    adapt_megatron_core_to_cpu()
    from megatron_cpt.model.build import build_model
    from megatron_cpt.model.load_megatron import load_megatron_weights
    from megatron_cpt.runtime.distributed import init_runtime

    config = build_config(
        {
            "job_name": "eval",
            "model": {"init_from": str(checkpoint)},
            "precision": {"dtype": PRECISION[arch.dtype]},
            "batch": {"seq_length": 1},  # blocks of any length are scored; the largest is checked by the caller
        }
    )
    device = init_runtime(config).device
    (model,) = build_model(config, arch)
    load_megatron_weights([model], checkpoint)
    model.eval()

    @torch.inference_mode()
    def score(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        losses = model(inputs.to(device), positions, None, labels=labels.to(device))
        return float(losses.double().sum())

    longest = min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings)
    return LoadedModel(score, arch.vocab_size, longest)
