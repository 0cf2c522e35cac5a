"""Faults that a test puts into the ranks of a RankPool (TEST_FAULT=tests.faults:name); parameters by environment."""

from __future__ import annotations

import errno
import functools
import math
import os
from pathlib import Path
from typing import Any


def _steps(name: str) -> set[int]:
    return {int(number) for number in os.environ[name].split(",")}


def nan_gradients() -> None:
    """The gradient norm of the steps in NAN_STEPS (counted in this process, from 1) is NaN."""
    from megatron_cpt.train import step

    bad, done, real = _steps("NAN_STEPS"), [0], step._update

    def update(state: Any, *args: Any) -> Any:
        done[0] += 1
        if done[0] not in bad:
            return real(state, *args)
        norm = state.optimizer.get_grad_norm
        state.optimizer.get_grad_norm = lambda: math.nan
        try:
            return real(state, *args)
        finally:
            state.optimizer.get_grad_norm = norm

    step._update = update


def loss_spikes() -> None:
    """The loss of the steps in SPIKE_STEPS is ten times what it is."""
    from megatron_cpt.train import step

    bad, done, real = _steps("SPIKE_STEPS"), [0], step.run_schedule

    def run_schedule(*args: Any, forward_only: bool) -> Any:
        sums = real(*args, forward_only=forward_only)
        done[0] += not forward_only
        if done[0] in bad and not forward_only:
            sums.loss *= 10
        return sums

    step.run_schedule = run_schedule


def full_disk() -> None:
    """Writing a shard fails with ENOSPC while the file FULL_DISK exists."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    flag, real = Path(os.environ["FULL_DISK"]), filesystem_async._write_item

    @functools.wraps(real)  # Megatron-Core looks at its signature
    def write_item(*args: Any, **kwargs: Any) -> Any:
        if flag.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    filesystem_async._write_item = write_item


def full_disk_at_the_marker() -> None:
    """Writing the marker fails with ENOSPC while the file FULL_DISK exists, when all shards are written."""
    from megatron_cpt.runs import checkpoints as checkpoint_folder

    flag, real = Path(os.environ["FULL_DISK"]), checkpoint_folder.write_atomically

    def write_atomically(path: Path, data: bytes) -> None:
        if flag.exists() and path.name == "complete.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    checkpoint_folder.write_atomically = write_atomically


def no_free_bytes() -> None:
    """The file system has 7 bytes left when a checkpoint is to be written."""
    from megatron_cpt.train import checkpoint_space

    checkpoint_space.free_bytes = lambda root: 7


def engine_handles_optimizer() -> None:
    """No fault: the optimizer's state is saved and loaded by Megatron-Core's own code, for comparison."""
    from megatron_cpt.train import checkpoint_state

    def gathered(optimizer: Any, models: dict[str, Any], sharding: str, *, is_loading: bool = False) -> Any:
        metadata = {"distrib_optim_sharding_type": sharding}
        return optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)

    checkpoint_state.optimizer_shards = gathered
    checkpoint_state.wanted_optimizer_shards = functools.partial(gathered, is_loading=True)
    checkpoint_state.put_optimizer_state = lambda optimizer, loaded, models: optimizer.load_state_dict(loaded)
