"""What Megatron-Core and the file system raise while a checkpoint is saved or loaded, as errors that name it."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpt.errors import CheckpointError

logger = logging.getLogger(__name__)

_EXPECTED = (OSError, RuntimeError, ValueError, KeyError, CheckpointingException)


class SaveFailed(CheckpointError):
    """A save could not be written, and every rank knows: the run may go on without it."""


def save_failed(path: Path, why: str) -> SaveFailed:
    """Delete the files of a failed save, if any, and return its error."""
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    return SaveFailed(
        f"cannot save checkpoint {path}: {why}",
        hint="is the disk full? the newest complete checkpoint is untouched",
    )


@contextlib.contextmanager
def named_failure(path: Path, doing: str = "save") -> Iterator[None]:
    """Raise a failure while saving or loading `path` as a CheckpointError.

    Raises:
        SaveFailed: no rank could go on with the save, and all know it.
        CheckpointError: anything else.
    """
    try:
        yield
    except CheckpointException as error:  # torch's, no Exception: raised on all ranks when any could not write
        logger.debug("details", exc_info=error)
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        causes = causes or "another rank could not"
        if doing == "save":
            raise save_failed(path, causes) from error
        raise CheckpointError(
            f"cannot {doing} checkpoint {path}: {causes}",
            hint="it is untouched; does it belong to this model, layout and optimizer?",
        ) from error
    except _EXPECTED as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.debug("details", exc_info=error)
        raise CheckpointError(
            f"cannot {doing} checkpoint {path}: {first}",
            hint="the newest complete checkpoint is untouched; start again to continue from it",
        ) from error
