"""Start the ranks of one machine, watch them, and end with one exit code and one message.

Each rank is a process of its own (`python -m megatron_cpt.train.rank`) that writes to RUN/logs; rank 0 is also
handed this process's stderr for its progress lines. When a rank fails the others are ended, and the error that it
left behind is raised here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.runs.exit_codes import STOPPED
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.rank_errors import read_rank_error

logger = logging.getLogger(__name__)

CONSOLE_FD = "MEGATRON_CPT_CONSOLE_FD"  # file descriptor of the user's terminal, for rank 0
RANK_COMMAND = (sys.executable, "-m", "megatron_cpt.train.rank")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # for ranks whose peer failed to notice, and to say why
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class RankFailure(CptError):
    """A rank's own error, with its exit code."""

    def __init__(self, message: str, *, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun has already started one process per rank."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def adopt_slurm_ranks(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """torchrun's variables from srun's, for `srun --ntasks-per-node=GPUS`; empty without a job of several tasks."""
    if "RANK" in environ or int(environ.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environ:
        return {}
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_PORT": environ.get("MASTER_PORT", str(20_000 + int(environ["SLURM_JOB_ID"]) % 20_000)),
    }


def run_ranks(folder: RunFolder, arguments: Sequence[str], world_size: int) -> int:
    """Run `world_size` ranks with the command line `arguments`; the exit code all of them agreed on.

    Raises:
        CptError: a rank failed; with its own message where it left one.
    """
    for rank in range(world_size):
        folder.rank_error(rank).unlink(missing_ok=True)
    environ = _environment(world_size)
    logs = [folder.rank_log(rank).open("ab") for rank in range(world_size)]
    ranks: list[subprocess.Popen[bytes]] = []
    previous = {s: signal.signal(s, lambda number, _: _forward(ranks, number)) for s in _FORWARDED}
    try:
        for rank, log in enumerate(logs):
            ranks.append(_start(rank, arguments, environ, log))
        codes = _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for log in logs:
            log.close()
    failed = next((rank for rank in _first_failures(codes) if codes[rank] not in (0, STOPPED)), None)
    if failed is None:
        return max(codes)
    raise _rank_failure(folder, failed, codes[failed], world_size)


def _environment(world_size: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port that is free, and outside the range from which the system gives ports to outgoing connections.

    Rank 0 listens on it seconds later; a port of that range could be taken by then.
    """
    for _ in range(100):
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LaunchError("no free port between 15000 and 30000", hint="close some of this machine's listening programs")


def _start(rank: int, arguments: Sequence[str], environ: Mapping[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    console = (os.dup(sys.stderr.fileno()),) if rank == 0 else ()  # its own stderr becomes the log
    if console:
        own[CONSOLE_FD] = str(console[0])
    process = subprocess.Popen(
        [*RANK_COMMAND, *arguments],
        env={**environ, **own},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=console,
        start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
    )
    for descriptor in console:
        os.close(descriptor)
    return process


def _forward(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; once a rank failed, those that have not noticed within the grace time are killed."""
    kill_at: float | None = None
    while None in (codes := [process.poll() for process in ranks]):  # all of them: one may have died before rank 0
        time.sleep(_POLL_SECONDS)
        failed = any(code not in (None, 0, STOPPED) for code in codes)
        if failed and kill_at is None:
            kill_at = time.monotonic() + _GRACE_SECONDS
        if kill_at is not None and time.monotonic() > kill_at:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
    return [code for code in codes if code is not None]


def _first_failures(codes: Sequence[int]) -> list[int]:
    """Ranks, those that said why first: a rank ended by a signal is mostly a victim of another."""
    return sorted(range(len(codes)), key=lambda rank: codes[rank] <= 1)


def _rank_failure(folder: RunFolder, rank: int, code: int, world_size: int) -> CptError:
    for candidate in [rank, *range(world_size)]:
        path = folder.rank_error(candidate)
        if path.exists():
            told = read_rank_error(path)
            return RankFailure(told.message, hint=told.hint, exit_code=told.exit_code)
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RankFailure(
        f"rank {rank} {how}; the last lines of {folder.rank_log(rank)}:\n{_tail(folder.rank_log(rank))}",
        hint="start the same command again: it continues from the newest complete checkpoint",
        exit_code=code if code > 0 else 1,
    )


def _tail(path: Path, lines: int = 12) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        text = file.read().decode(errors="replace")
    return "\n".join("  " + line for line in text.splitlines()[-lines:])
