"""Start the ranks of one machine, watch them, and end with one exit code and one message.

Each rank is a process of its own (`python -m megatron_cpt.train.rank`) that writes to RUN/logs; rank 0 is also
handed this process's console for its progress lines. When a rank fails the others are ended, and the error that it
left behind is raised here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.console_descriptor import console_descriptor
from megatron_cpt.launch.forwarded_signals import FORWARDED, ForwardedSignals, forwarded_signals
from megatron_cpt.runs.exit_codes import FAILED, STOPPED
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.rank_errors import read_rank_error
from megatron_cpt.runs.repeated_failures import START_AGAIN, advise_after_failure

logger = logging.getLogger(__name__)

CONSOLE_FD = "MEGATRON_CPT_CONSOLE_FD"  # file descriptor of the user's console, for rank 0
RANK_COMMAND = (sys.executable, "-m", "megatron_cpt.train.rank")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # for ranks whose peer failed to notice, and to say why
_CHATTER = re.compile(
    r"^\S+ \S+ (DEBUG|INFO) \[rank \d+\] (?!megatron_cpt)|^(DEBUG|INFO):|^> |Warning:|warnings\.warn\("
)


class RankFailure(CptError):
    """A rank's own error, with its exit code."""

    def __init__(self, message: str, *, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class StoppedAtOnce(CptError):
    """The user pressed Ctrl-C twice."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "stopped at once, without saving",
            hint="start the same command again: it continues from the newest complete checkpoint",
        )


def run_ranks(
    folder: RunFolder,
    arguments: Sequence[str],
    world_size: int,
    command: Sequence[str] | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run `world_size` ranks with the command line `arguments`. Return the exit code all of them agreed on.

    `command` is what each rank runs, by default training; `variables` are added to its environment. RUN/logs is there.

    Raises:
        CptError: a rank failed, with its own message where it left one; or the user pressed Ctrl-C twice.
    """
    for rank in range(world_size):
        folder.rank_error(rank).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(folder.rank_log(rank).open("ab")) for rank in range(world_size)]
        written_before = [log.tell() for log in logs]  # by earlier attempts
        console = stack.enter_context(console_descriptor())
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_kill, ranks)
        signals = stack.enter_context(forwarded_signals(ranks))
        environ = _environment(world_size) | dict(variables)
        for rank, log in enumerate(logs):
            ranks.append(
                _start(rank, [*(command or RANK_COMMAND), *arguments], environ, log, console if rank == 0 else None)
            )
        codes = _wait(ranks, signals)
    if signals.at_once:
        raise StoppedAtOnce
    if signals.stopping and all(code in (0, STOPPED) or -code in FORWARDED for code in codes):
        return STOPPED if any(codes) else 0  # a rank that was not up yet dies of the signal itself
    failed = next((rank for rank in _first_failures(codes) if codes[rank] not in (0, STOPPED)), None)
    if failed is None:
        return max(codes)
    raise _rank_failure(folder, failed, codes, written_before[failed])


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


def _start(
    rank: int, command: Sequence[str], environ: Mapping[str, str], log: BinaryIO, console: int | None
) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if console is not None:
        own[CONSOLE_FD] = str(console)
    return subprocess.Popen(
        command,
        env={**environ, **own},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=() if console is None else (console,),
        start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
    )


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signals: ForwardedSignals) -> list[int]:
    """Exit codes; once a rank failed, those that have not noticed within the grace time are killed."""
    kill_at: float | None = None
    while None in (codes := [process.poll() for process in ranks]):  # all of them: one may have died before rank 0
        time.sleep(_POLL_SECONDS)
        signals.say_what_happens()
        failed = any(code not in (None, 0, STOPPED) for code in codes)
        if failed and kill_at is None:
            kill_at = time.monotonic() + _GRACE_SECONDS
        if signals.at_once or (kill_at is not None and time.monotonic() > kill_at):
            for process in ranks:
                if process.poll() is None:
                    process.kill()
    return [code for code in codes if code is not None]


def _first_failures(codes: Sequence[int]) -> list[int]:
    """Failed ranks, those that left a reason first; a rank killed by a signal usually died because of another."""
    return sorted(range(len(codes)), key=lambda rank: codes[rank] <= 1)


def _rank_failure(folder: RunFolder, rank: int, codes: Sequence[int], written_before: int) -> CptError:
    for candidate in [rank, *range(len(codes))]:
        path = folder.rank_error(candidate)
        if path.exists():
            told = read_rank_error(path)
            return RankFailure(told.message, hint=told.hint, exit_code=told.exit_code)
    code = codes[rank]
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint, advised = (
        (START_AGAIN, FAILED) if code < 0 else advise_after_failure(folder, rank)
    )  # a signal need not repeat
    words = last_words(folder.rank_log(rank), written_before)
    return RankFailure(
        f"rank {rank} {how}; the last lines of {folder.rank_log(rank)}:\n{words}",
        hint=hint,
        exit_code=code if code > 1 else advised,
    )


def last_words(path: Path, offset: int, lines: int = 12) -> str:
    """The end of a rank's log behind byte `offset`, without what other packages log of their normal work."""
    with path.open("rb") as file:
        file.seek(max(offset, path.stat().st_size - 65_536))
        text = file.read().decode(errors="replace")
    told = [line for line in text.splitlines() if line.strip() and not _CHATTER.search(line)]
    return "\n".join("  " + line for line in told[-lines:]) or "  (nothing in this attempt)"
