"""Process groups, device and seeds of one rank, set up from the run's config and torchrun's environment."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str  # "nccl" or "gloo"


def init_runtime(config: RunConfig, *, timeout_minutes: float = 10.0) -> Runtime:
    """Join the job: process groups for the layout of `config.parallel`, this rank's device, seeds.

    Raises:
        LaunchError: the number of processes contradicts the config, or there are fewer GPUs than processes.
    """
    expected = config.parallel.world_size
    rank, world_size, local_rank = _place(expected)
    adapt_megatron_core_to_cpu()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}",
                hint="set parallel.gpus_per_node to the number of GPUs of a node",
            )
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if all(name in os.environ for name in _TORCHRUN):
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
    init_parallel_groups(config, timeout_minutes=timeout_minutes)
    return Runtime(rank, world_size, local_rank, device, backend)


def _place(expected: int) -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, or a job of one process."""
    missing = [name for name in _TORCHRUN if name not in os.environ]
    rank, world_size, local_rank = (
        (0, 1, 0) if missing else tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    )
    if world_size != expected:
        found = f"{world_size} process{'es' if world_size > 1 else ''} started"
        because = f" ({', '.join(missing)} not set: not under torchrun)" if missing else ""
        raise LaunchError(
            f"parallel.nodes x parallel.gpus_per_node asks for {expected} processes, {found}{because}",
            hint=f"start it with `torchrun --nproc-per-node N`, {expected} processes in all, or let "
            "`megatron-cpt train` start them",
        )
    return rank, world_size, local_rank


def init_parallel_groups(config: RunConfig, *, timeout_minutes: float = 10.0) -> None:
    """Megatron-Core's groups for this layout, and seeds; also used to change the layout within one process."""
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    _forget_parallel_groups()
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp and parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    # Pipeline stages draw different dropout; data-parallel ranks the same, as their samples differ anyhow.
    seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _forget_parallel_groups() -> None:
    """Destroy the groups of an earlier layout: Megatron-Core drops its names only, and each keeps polling threads."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def shutdown_runtime() -> None:
    """Leave the job; safe to call twice, or when `init_runtime` failed half way."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Run code without collectives; when one rank fails every rank raises that error, so that none waits for ever.

    Ranks that succeeded raise the error of the first rank that did not, with its rank in the message.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = None if failure is None else (type(failure), getattr(failure, "message", str(failure)), _hint(failure))
    failures = [told]
    if dist.is_initialized() and dist.get_world_size() > 1:
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, told)
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            kind, message, hint = other
            error_type = kind if issubclass(kind, CptError) else CptError
            raise error_type(f"rank {rank}: {message}", hint=hint)


def _hint(error: Exception) -> str | None:
    return getattr(error, "hint", None)
