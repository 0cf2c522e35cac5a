"""The one module that knows how Megatron-Core's versions differ, 0.16 to 0.19.

Each seam says what changed and in which version. Nothing here imports Megatron-Core before a function is called, so
that `cpu.py` can read the names that it adapts. A version outside the range is refused by `launch.engine`.
0.18 also changed `get_batch_on_this_cp_rank`, which is not called: `data.micro_batch` cuts sequences itself.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_cpt.launch.engine import check_engine

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

# 0.17 dropped the underscore from the function that makes the queue for the results of a save.
WRITE_RESULTS_QUEUES = ("_get_write_results_queue", "get_write_results_queue")

# 0.18 made every model import triton: in `paged_stash`, moved to `ops.paged_stash` in 0.19. Its kernels are for
# mixtures of experts on a GPU, and a build of torch for the CPU brings no triton.
TRITON_MODULES = ("megatron.core.transformer.moe.paged_stash", "megatron.core.transformer.moe.ops.paged_stash")

# 0.19 puts what is not sharded (settings of the optimizer, arguments of Megatron-LM) under this key among the shards.
COMMON_STATE = "common_state"


@functools.cache
def engine_version() -> tuple[int, int]:
    """Major and minor version of Megatron-Core. Raises LaunchError outside the proven range."""
    engine = check_engine()
    assert engine.version is not None
    return engine.version[:2]


def begin_save(
    state: dict[str, Any], folder: Path, strategy: TorchDistSaveShardedStrategy, *, validate: bool
) -> AsyncRequest:
    """Plan the save of a sharded state dict whose factories are applied; its files are written by the request.

    0.17 made nvidia-resiliency-ext the default writer; the one asked for here is in every version.
    0.19 writes `COMMON_STATE` instead of the file `common.pt`; here the file is written as well, and every version
    reads it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

    writer = {}
    if engine_version() >= (0, 17):
        writer = {"async_strategy": "mcore"}
        _say_nothing_of_the_other_writer()
    request: AsyncRequest | None = dist_checkpointing.save(
        state, str(folder), strategy, validate_access_integrity=validate, async_sharded_save=True, **writer
    )
    assert request is not None
    if engine_version() >= (0, 19) and dist.get_rank() == 0:
        _, persistent = extract_nonpersistent(state)
        _, common = extract_sharded_base(persistent)
        torch.save(common, folder / "common.pt")
    return request


@functools.cache
def _say_nothing_of_the_other_writer() -> None:
    """0.17 to 0.19 warn that their own writer will go: the proven range ends before that."""
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    logger.addFilter(lambda record: "MCore's async save is deprecated" not in str(record.msg))


def adopt_learning_rates(optimizer_state: Any, group: dict[str, Any]) -> None:
    """Give every parameter group in a loaded optimizer state the learning rates of `group`, a current one.

    0.19 recognises a group by its learning rates too, and raises KeyError when a run continues with others. The rate
    of each step comes from our schedule in any case.
    """
    if isinstance(optimizer_state, dict):
        for loaded in optimizer_state.get("param_groups", ()):
            loaded.update({name: group[name] for name in ("max_lr", "min_lr") if name in group})
        for value in optimizer_state.values():
            adopt_learning_rates(value, group)
