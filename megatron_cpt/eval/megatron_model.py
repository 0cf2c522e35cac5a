"""Score tokens with Megatron-Core itself, from a torch_dist checkpoint of any layout, in one process."""

from __future__ import annotations

import atexit
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.load import build_config
from megatron_cpt.eval.scorer import Scorer
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

PRECISION = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


def megatron_scorer(checkpoint: Path, arch: Architecture, seq_length: int, document_attention: bool) -> Scorer:
    """Build the model of `arch` without parallelism and set its weights from the torch_dist folder `checkpoint`.

    `arch.dtype` is the dtype of the stored weights, `seq_length` the longest block that will be scored;
    `document_attention` says whether documents will be kept apart.

    Raises:
        CheckpointError: the checkpoint is incomplete or of another model.
        ConfigError: the model attends within a window shorter than `seq_length`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core's, of what is not installed
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        adapt_megatron_core_to_cpu()
        from megatron_cpt.model.build import build_model
        from megatron_cpt.model.load_megatron import load_megatron_weights
        from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime

        config = build_config(
            {
                "job_name": "eval",
                "model": {"init_from": str(checkpoint), "document_attention": document_attention},
                "precision": {"dtype": PRECISION[arch.dtype]},
                "batch": {"seq_length": seq_length},
            }
        )
        device = init_runtime(config).device
        atexit.register(shutdown_runtime)  # gloo's threads may abort an interpreter that ends around them
        (model,) = build_model(config, arch)
        load_megatron_weights([model], checkpoint)
    model.eval()
    return _MegatronScorer(model, device)


class _MegatronScorer:
    """See `Scorer`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    @torch.inference_mode()
    def nll(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        from megatron_cpt.model.attention import document_starts

        inputs, labels = tokens[:, :-1].to(self._device), tokens[:, 1:].to(self._device)
        positions = torch.arange(inputs.shape[1], device=self._device).expand_as(inputs)
        documents = None if document_ids is None else document_starts(document_ids)
        losses: Tensor = self._model(inputs.contiguous(), positions, documents, labels=labels.contiguous())
        return losses.float()
