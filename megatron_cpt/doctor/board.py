"""Where the processes of a job leave messages for each other: the store at which torchrun's or srun's ranks meet."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from typing import Protocol

from megatron_cpt.errors import LaunchError

MEET_MINUTES = 2.0


class Board(Protocol):
    """Messages by key, seen by every process of the job."""

    def put(self, key: str, text: str) -> None:
        """Leave `text` under `key`."""

    def get(self, key: str, timeout_seconds: float) -> str | None:
        """Return what is left under `key`, None when nothing is after the timeout."""


class StoreBoard:
    """The board of the job that this process belongs to; the only part of a check of machines that imports torch."""

    def __init__(self) -> None:
        """Meet the other ranks.

        Raises:
            LaunchError: they cannot meet within MEET_MINUTES.
        """
        from megatron_cpt.runtime.distributed import meeting_store

        self._store = meeting_store(MEET_MINUTES)

    def put(self, key: str, text: str) -> None:
        try:
            self._store.set(f"doctor/{key}", text)
        except RuntimeError as error:
            raise LaunchError(
                f"the store at which the ranks meet is gone: {str(error).splitlines()[0]}",
                hint="rank 0 or its launcher has ended: its log says why",
            ) from error

    def get(self, key: str, timeout_seconds: float) -> str | None:
        try:
            self._store.wait([f"doctor/{key}"], datetime.timedelta(seconds=max(0.1, timeout_seconds)))
        except RuntimeError:  # torch's DistStoreError: the timeout, or the end of the process that keeps the store
            return None
        return self._store.get(f"doctor/{key}").decode()


def gather(board: Board, name: str, ranks: Iterable[int], timeout_seconds: float) -> dict[int, str]:
    """Return what each of `ranks` has left under NAME/RANK; those that leave nothing in time, all together, lack."""
    deadline = time.monotonic() + timeout_seconds
    answers = {rank: board.get(f"{name}/{rank}", deadline - time.monotonic()) for rank in ranks}
    return {rank: text for rank, text in answers.items() if text is not None}
