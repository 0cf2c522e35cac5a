"""Check before the first step that the loaded model knows language and computes what transformers does.

A conversion gone wrong trains on without complaint, from a loss near ln(vocabulary), that of a uniform guess. The
comparison with transformers on the same samples finds subtler mistakes; rank 0 makes it, where transformers is
installed and the model fits into free memory.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_cpt.architecture.families import read_config
from megatron_cpt.architecture.rope import RopeChange, with_rope
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.errors import CheckpointError
from megatron_cpt.launch.origin import Origin
from megatron_cpt.model.build import DTYPES
from megatron_cpt.runtime.distributed import failing_together
from megatron_cpt.train.state import TrainState
from megatron_cpt.train.step import evaluate_step

logger = logging.getLogger(__name__)

NEAR_UNIFORM_RATIO = 0.85  # of ln(vocabulary); real text costs a pretrained model a third of it, foreign text half
LOSS_BOUND = {"fp32": 1e-4, "bf16": 3e-2}  # absolute, on the mean loss per token
_MEMORY_FACTOR = 2.0  # of the model's own bytes: activations and logits
_LARGEST_COMPARED_PARAMETERS = 4_000_000_000  # beyond, a CPU would need minutes


def check_start(state: TrainState, batch: MicroBatch, origin: Origin) -> float | None:
    """Check the untrained state, with the weights of `origin`, on the first micro batch of data-parallel rank 0.

    Every rank calls it. Return the loss per token, None where the config or random weights leave the check out.

    Raises:
        CheckpointError: on every rank, when the loss is near ln(vocabulary) or is not transformers'.
    """
    config = state.config
    if origin.kind == "random" or not config.model.check_start:
        return None
    apart = batch.copy()
    apart.pop("document_ids", None)  # as transformers sees it
    loss_sum, tokens = evaluate_step(state, [apart] if parallel_state.get_data_parallel_rank() == 0 else [])
    loss, uniform = loss_sum / max(1, tokens), math.log(state.arch.vocab_size)
    if not loss <= NEAR_UNIFORM_RATIO * uniform:
        raise CheckpointError(
            f"the loss of the first samples is {loss:.3f} where a uniform guess costs ln(vocabulary) = {uniform:.3f}: "
            f"the weights of {origin.weights} know nothing of this text",
            hint="check the weights, and that the data was tokenised with this model's tokenizer; set "
            "model.check_start: false if the model is meant to start like this",
        )
    with failing_together():
        if dist.get_rank() == 0:
            _compare_with_transformers(state, apart, loss, origin.weights)
    return loss


def _compare_with_transformers(state: TrainState, batch: MicroBatch, loss: float, model_dir: Path) -> None:
    dtype = state.config.precision.dtype
    if reason := _why_not(model_dir, state.arch.num_parameters * DTYPES[dtype].itemsize, state.arch.num_parameters):
        logger.info("first loss %.4f; not compared with transformers: %s", loss, reason)
        return
    reference = transformers_loss(model_dir, batch, DTYPES[dtype], state.config.model.rope_change)
    difference, bound = abs(loss - reference), LOSS_BOUND[dtype]
    logger.info("first loss %.4f, in transformers %.4f: they differ by %.1e", loss, reference, difference)
    if not difference <= bound:
        raise CheckpointError(
            f"the loss of the first samples is {loss:.4f}, and {reference:.4f} in transformers on the same weights; "
            f"they may differ by {bound}",
            hint="this is a mistake in loading or computing the model; please report it with its config.json",
        )


def _why_not(model_dir: Path, weight_bytes: int, parameters: int) -> str | None:
    """Why the comparison is left out, None when it can be made."""
    if not (model_dir / "config.json").is_file():
        return "the weights are not in Hugging Face form"
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    if parameters > _LARGEST_COMPARED_PARAMETERS:
        return "the model is too large to compute on one CPU"
    free_bytes = psutil.virtual_memory().available
    if free_bytes < weight_bytes * (1 + _MEMORY_FACTOR):
        return f"only {free_bytes / 2**30:.1f} GiB of memory are free"
    return None


@torch.no_grad()
def transformers_loss(model_dir: Path, batch: MicroBatch, dtype: torch.dtype, rope: RopeChange | None = None) -> float:
    """Mean loss per counted token of the micro batch, computed by transformers on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = with_rope(read_config(model_dir), rope)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_pretrained(model_dir, config=config, dtype=dtype, local_files_only=True).eval()
    logits = model(batch["tokens"].cpu()).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].cpu().flatten(), reduction="none")
    mask = batch["loss_mask"].cpu().flatten()
    return float((losses * mask).sum() / mask.sum())
