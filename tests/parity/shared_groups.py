"""Process groups that the rows of one worker share.

Each layout has some twenty groups, each with polling threads of gloo's that outlive `destroy_process_group` as long as
anything in the process holds the group, and Megatron-Core's hooks do. After forty rows a worker spent most of its time
in them. Here a group is made once for its ranks and its place among the groups of the same ranks within a layout, so
that groups which a layout keeps apart stay apart.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.runtime import distributed

Key = tuple[tuple[int, ...] | None, Any]  # ranks, back end


@contextmanager
def shared_groups() -> Iterator[None]:
    """Inside, a change of the layout takes its groups from those that earlier layouts have made."""
    made: dict[tuple[Key, int], Any] = {}
    taken: Counter[Key] = Counter()
    new_group, destroy, forget = dist.new_group, dist.destroy_process_group, distributed._forget_parallel_groups

    def take_group(ranks: list[int] | None = None, *args: Any, **options: Any) -> Any:
        key = (None if ranks is None else tuple(ranks), options.get("backend"))
        taken[key] += 1
        if (key, taken[key]) not in made:
            made[key, taken[key]] = new_group(ranks, *args, **options)
        return made[key, taken[key]]

    def begin_layout() -> None:
        dist.destroy_process_group = lambda group=None: None  # Megatron-Core ends some of its groups itself
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group = destroy
        taken.clear()

    dist.new_group, distributed._forget_parallel_groups = take_group, begin_layout
    try:
        yield
    finally:
        dist.new_group, distributed._forget_parallel_groups = new_group, forget


def run_worker(main: Callable[[], None]) -> None:
    """Run a worker's `main` with shared groups; its traceback is out before other ranks wait for this one."""
    try:
        with shared_groups():
            main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
