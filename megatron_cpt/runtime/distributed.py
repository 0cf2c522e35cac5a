"""Process groups, device and seeds of one rank, set up from the run's config and torchrun's environment."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.place import check_variables, check_world_size
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

_met: list[Store] = []
_inits = itertools.count()  # a process may join and leave a job several times: each time has its own keys


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
    check_world_size(config.parallel.world_size)
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    adapt_megatron_core_to_cpu()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}",
                hint="set parallel.gpus_per_node to the number of GPUs of a node",
            )
        _let_segments_grow()
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    store = PrefixStore(f"groups/{next(_inits)}", meeting_store())
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    init_parallel_groups(config, timeout_minutes=timeout_minutes)
    return Runtime(rank, world_size, local_rank, device, backend)


def _let_segments_grow() -> None:
    """Have torch's allocator grow its segments instead of keeping blocks of every size, unless the user chose.

    It must come before the first allocation. On an H200 the allocator then held 0.2 GiB beyond what a step uses, not
    1.7 to 5.8 GiB, at the same speed (benchmarks/planner_memory.py).
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def meeting_store(timeout_minutes: float = 30.0) -> Store:
    """The key-value store at which the ranks of torchrun or srun meet; one of its own for a job of one process.

    A process meets the others once; later calls return the same store, as rank 0 can listen only once.

    Raises:
        LaunchError: rank 0 cannot listen on MASTER_PORT, or the others do not reach it.
    """
    if not _met:
        _met.append(_meet(timeout_minutes))
    return _met[0]


def _meet(timeout_minutes: float) -> Store:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return HashStore()
    check_variables()
    try:
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(minutes=timeout_minutes)))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"rank {os.environ.get('RANK')} cannot meet the others at {where}: {str(error).splitlines()[0]}",
            hint="is the port in use, or the host not reachable? set MASTER_ADDR to the host of rank 0 and MASTER_PORT "
            "to a free port",
        ) from error
    return store


def tell_ranks(store: Store, text: str, wait_seconds: float = 60.0) -> None:
    """Give `text` to every other rank as the key `prepared`, and wait until they have it, lest the store end first."""
    store.set("prepared", text)
    others = [f"heard/{rank}" for rank in range(1, int(os.environ.get("WORLD_SIZE", "1")))]
    with contextlib.suppress(RuntimeError):  # one that never came: its absence is noticed when the groups are made
        if others:
            store.wait(others, datetime.timedelta(seconds=wait_seconds))


def init_parallel_groups(config: RunConfig, *, timeout_minutes: float = 10.0, gloo: bool = True) -> None:
    """Megatron-Core's groups for this layout, and seeds; also used to change the layout within one process.

    Without `gloo` there are no second data-parallel groups for tensors in host memory.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    _forget_parallel_groups()
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp and parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=gloo,
    )
    # Pipeline stages draw different dropout; data-parallel ranks the same, because their samples differ.
    seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def has_gloo_groups() -> bool:
    """Whether `init_parallel_groups` made data-parallel groups for tensors in host memory."""
    from megatron.core import parallel_state

    return parallel_state._DATA_PARALLEL_GROUP_GLOO is not None


def _forget_parallel_groups() -> None:
    """Destroy the groups of an earlier layout: Megatron-Core drops its names only, and each keeps polling threads."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def leave_together() -> None:
    """Wait until every rank has nothing left to do."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


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
