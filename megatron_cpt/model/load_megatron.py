"""Weights of a Megatron torch_dist checkpoint -> this rank's part of the model, under any layout.

Only the model is read: the optimizer starts afresh, as a new continued pre-training does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception: a BaseException

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.distributed import failing_together


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether `folder` itself is a torch_dist checkpoint (not a folder of several)."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()


def load_megatron_weights(chunks: list[GPTModel], folder: Path) -> None:
    """Set every parameter of this rank's chunks from a torch_dist checkpoint.

    Megatron-Core loads a checkpoint with a missing chunk in silence; the parameters are NaN before, so that what
    was not set is found.

    Raises:
        CheckpointError: on every rank when any rank finds the checkpoint unreadable, of another model or with holes.
    """
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    keys = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    wanted = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
    try:
        loaded = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not hold this model: {_reason(error)}",
            hint="check that model.architecture describes the checkpoint, and that it is complete",
        ) from error
    for key, chunk in zip(keys, chunks, strict=True):
        chunk.load_state_dict(loaded[key])
    with failing_together():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.isnan().any():
                    raise CheckpointError(
                        f"{name} in {folder} is incomplete or holds NaN", hint="use another checkpoint"
                    )


def _reason(error: BaseException) -> str:
    """One line: torch wraps what each rank met, with its traceback."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
