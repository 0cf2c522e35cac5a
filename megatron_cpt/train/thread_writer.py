"""Asynchronous saves of a rank that trains on the CPU: a copy in memory, and a thread that writes it.

Megatron-Core forks a process for the writer. Beside a GPU that is cheap: the process has the staged copies to itself.
A rank that trains on the CPU would pay a page fault and a copy for all memory that it changes while the writer lives,
which is all it has. The copy here is made into memory that is kept from save to save: its cost is that of reading and
writing what is saved, once. Writing, hashing and flushing need no interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket


class Staging:
    """Copies of what is being saved, in memory that the next save uses again."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, buckets: list[WriteBucket]) -> list[WriteBucket]:
        """`buckets` with copies of their tensors, valid until the next call."""
        return [
            (path, name, (data, [(item, self._copy((name, i), tensor)) for i, (item, tensor) in enumerate(tensors)]))
            for path, name, (data, tensors) in buckets
        ]

    def _copy(self, place: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        kept = self._copies.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._copies[place] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor)


def in_thread(request: AsyncRequest, staging: Staging | None) -> AsyncRequest:
    """`request` written by the thread that runs it, from copies where there is a `staging`."""
    if request.async_fn is None:
        return request  # nothing to write on this rank
    transforms = request.async_fn.args[0]  # of Megatron-Core's partial(write_preloaded_data_multiproc, ...)
    buckets = request.async_fn_args[1]
    return request._replace(
        async_fn=partial(_write, transforms),
        preload_fn=partial(staging.copy, buckets) if staging is not None else lambda: buckets,
    )


def _write(transforms: list[Any], rank: int, buckets: list[WriteBucket], results: Any) -> None:
    """Megatron-Core's `write_preloaded_data_multiproc` without processes: the results, or the first error."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        result: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, result, running, use_fsync=True)
        _, outcome = result.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)


class ThreadQueue(AsyncCallsQueue):
    def _get_async_caller(self) -> AsyncCaller:
        return ThreadCaller()


class ThreadCaller(AsyncCaller):
    """Runs one request in a thread; the ranks agree on its end as they do on that of Megatron-Core's processes."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        if async_req.async_fn is None:
            return
        arguments = list(async_req.async_fn_args)
        arguments[1] = async_req.preload_fn()
        self._thread = threading.Thread(target=async_req.async_fn, args=arguments, name="checkpoint")
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        writing = int(self._thread is not None and self._thread.is_alive())
        done = not writing if no_dist else bool(self.sync_all_async_calls(writing))
        if done or blocking:
            self.close()
            return True
        return False

    def close(self, abort: bool = False) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __del__(self) -> None: ...
