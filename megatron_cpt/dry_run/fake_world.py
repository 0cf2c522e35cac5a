"""One process as any rank of a job: Megatron-Core's process groups over a backend that moves nothing, tensors on meta.

torch's fake backend answers every collective at once and leaves tensors as they are. On the meta device a tensor has a
shape, a dtype and a storage of a size, but no memory, so a rank of a model of any size takes a few megabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import LaunchError
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu, engine_on_meta
from megatron_cpt.runtime.distributed import init_parallel_groups, shutdown_runtime

_BACKEND = "fake"
META = torch.device("meta")


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank in the layout. `dp` counts data- and context-parallel ranks together, as gradients do."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int

    def __str__(self) -> str:
        return f"rank {self.rank} (tp {self.tp}, cp {self.cp}, dp {self.dp}, pp {self.pp})"


def prepare_process() -> None:
    """Make this process able to be any rank; call it before the first import of Megatron-Core.

    Raises:
        LaunchError: the process is a rank of a real job, or sees a GPU, on which Megatron-Core would build the model.
    """
    if dist.is_initialized():
        raise LaunchError("a rank of a job cannot make a dry run", hint="start a process of its own for it")
    if torch.cuda.is_available():
        raise LaunchError(
            "a dry run needs no GPU, and Megatron-Core would use the one that it sees",
            hint="set CUDA_VISIBLE_DEVICES to nothing, as `megatron-cpt dry-run` does",
        )
    adapt_megatron_core_to_cpu()
    devices = dist.Backend.backend_capability[_BACKEND]
    if META.type not in devices:
        devices.append(META.type)


@contextlib.contextmanager
def as_rank(config: RunConfig, rank: int) -> Iterator[Place]:
    """Within it this process is `rank` of the layout of `config.parallel`; `prepare_process` comes before."""
    from megatron.core import parallel_state

    with engine_on_meta():
        world_size = config.parallel.world_size
        dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
        try:
            init_parallel_groups(config, gloo=False)
            yield Place(
                rank,
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_pipeline_model_parallel_rank(),
            )
        finally:
            shutdown_runtime()
