"""Requests from outside the loop: signals, switch files and the wall-time limit, agreed by all ranks at a step's end.

    SIGTERM, SIGUSR1, Ctrl-C, SIGHUP, RUN/STOP, the wall-time limit,
    or the process that started the ranks is gone  save, then exit 75
    RUN/SAVE                                       save and go on
    RUN/KILL                                       exit 76 at once, without saving
Any rank that saw a request makes it everyone's: one small all-reduce per step.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_cpt.train.stop_signals import describe_signal, handle_stop_signals

logger = logging.getLogger(__name__)

SAVE, STOP, KILL = "SAVE", "STOP", "KILL"


@dataclass(frozen=True)
class Request:
    """What all ranks do after this step."""

    save: bool = False
    stop: bool = False
    kill: bool = False
    reason: str = ""
    by_person: bool = False  # who does not want it to be started again at once: the file STOP, or Ctrl-C


class Control:
    def __init__(self, root: Path, device: torch.device, wall_time_limit_seconds: float | None) -> None:
        self.root = root
        self.device = device
        self.limit = wall_time_limit_seconds
        self.started = time.monotonic()
        self._signal: int | None = None
        self._parent = os.getppid()
        handle_stop_signals(self._on_signal)
        if dist.get_rank() == 0:
            for name in (STOP, SAVE):  # left from before this attempt; KILL stays until a person removes it
                (root / name).unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agree(self) -> Request:
        """The union of what any rank was asked; collective."""
        files = {name: (self.root / name).exists() for name in (SAVE, STOP, KILL)} if dist.get_rank() == 0 else {}
        timed_out = self.limit is not None and time.monotonic() - self.started >= self.limit
        local = [
            float(self._signal or 0),
            float(timed_out),
            float(os.getppid() != self._parent),
            *(float(files.get(name, False)) for name in (SAVE, STOP, KILL)),
        ]
        asked = torch.tensor(local, device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number, limit, orphaned, save, stop, kill = (int(value) for value in asked.tolist())
        if save and dist.get_rank() == 0:
            (self.root / SAVE).unlink(missing_ok=True)
        reasons = [
            describe_signal(number) if number else "",
            "the wall-time limit" if limit else "",
            "the end of the process that started the ranks" if orphaned else "",
            f"the file {self.root / STOP}" if stop else "",
            f"the file {self.root / KILL}" if kill else "",
        ]
        return Request(
            bool(save),
            bool(number or limit or orphaned or stop),
            bool(kill),
            " and ".join(reason for reason in reasons if reason),
            by_person=bool(stop) or number == signal.SIGINT,
        )
