"""One writer per run folder: a lease with a heartbeat that survives a dead node.

RUN/lease.json names its holder, and the holder raises a counter in it every few seconds. Whoever wants the folder
while a lease lies there watches the counter: it moves -> another job is writing, refuse; it stands still -> its
holder is dead or cut off, take over. Clocks are never compared. On the holder's own machine its process is looked
up instead, so a restart after a kill does not wait. A later start of the same Slurm job does not wait either: Slurm
has given the job up on its earlier nodes, and a rank that still beats there is cut off. A holder that was cut off finds
another name in the file: it is told so (`on_lost`) and must not write (`still_held`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_cpt.errors import CheckpointError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
_MISSED_BEATS = 4  # beats without a change after which a holder counts as dead


@dataclass(frozen=True)
class Holder:
    token: str
    host: str
    pid: int
    process_space: str  # two processes with the same one see each other's ids
    process_started: str  # tells a process from a later one with the same id
    job: str | None
    beat: int = 0
    cluster: str | None = None
    restart: int = 0  # how often Slurm had started the job again

    def is_later_start_than(self, other: Holder) -> bool:
        """Whether Slurm started the job of `other` again and this is the later start."""
        same_job = self.job is not None and (self.cluster, self.job) == (other.cluster, other.job)
        return same_job and self.restart > other.restart

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def _this_process() -> Holder:
    pid = os.getpid()
    return Holder(
        uuid.uuid4().hex,
        platform.node(),
        pid,
        _process_space(),
        process_started(pid) or "",
        os.environ.get("SLURM_JOB_ID"),
        cluster=os.environ.get("SLURM_CLUSTER_NAME"),
        restart=int(text) if (text := os.environ.get("SLURM_RESTART_COUNT", "")).isdecimal() else 0,
    )


def _process_space() -> str:
    """Boot id and process namespace of this machine or container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def process_started(pid: int) -> str | None:
    """Start time of a living process, None when there is none (a zombie counts as none)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]


def read_lease(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_alive_here(holder: Holder) -> bool | None:
    """Whether the holder's process lives; None when it runs where this process cannot see it."""
    if holder.process_space != _process_space():
        return None
    return process_started(holder.pid) == holder.process_started


def is_superseded(path: Path) -> bool:
    """Whether a later start of this process's Slurm job holds the lease: this one was cut off and must not write."""
    holder = read_lease(path)
    return holder is not None and holder.is_later_start_than(_this_process())


def refuse_if_held_here(path: Path) -> None:
    """Raise CheckpointError when a living process of this machine holds the lease; costs nothing."""
    holder = read_lease(path)
    if holder is not None and is_alive_here(holder) and not _this_process().is_later_start_than(holder):
        raise _refusal(path, holder)


def refuse_if_held(path: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
    """Raise CheckpointError when a job on any machine holds the lease; watches one of another machine for a while."""
    refuse_if_held_here(path)
    holder = read_lease(path)
    if holder is None or is_alive_here(holder) is not None or _this_process().is_later_start_than(holder):
        return
    if _beats(path, holder, heartbeat_seconds):
        raise _refusal(path, holder)


def refuse_or_clear(path: Path) -> None:
    """Raise CheckpointError when a living job holds the lease; remove a dead one's, so that nobody waits again."""
    refuse_if_held(path)
    with contextlib.suppress(OSError):  # no folder yet, or one that cannot be written: making it says so
        path.unlink()


def _beats(path: Path, holder: Holder, heartbeat_seconds: float) -> bool:
    """Whether the lease changes hands or its counter moves within a few heartbeats."""
    wait = _MISSED_BEATS * heartbeat_seconds
    logger.info("the run folder has a lease of %s: watching it for %.0f s", holder, wait)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(heartbeat_seconds / 4)
        now = read_lease(path)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _refusal(path: Path, holder: Holder) -> CheckpointError:
    return CheckpointError(
        f"{path.parent} is being written by {holder}",
        hint="wait for it or stop it (touch STOP in the run folder); two jobs must not share a run folder",
    )


class Lease:
    """Held from `acquire` to `release`; a thread keeps it alive."""

    def __init__(
        self,
        path: Path,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        on_lost: Callable[[CheckpointError], None] = lambda error: None,
    ) -> None:
        """`on_lost` is called, from the thread, with what to say when another job has taken the lease over."""
        self.path = path
        self.heartbeat_seconds = heartbeat_seconds
        self._on_lost = on_lost
        self._me = _this_process()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lease, waiting for the heartbeat of a holder that cannot be seen from here.

        Raises:
            CheckpointError: another job holds it.
        """
        holder = read_lease(self.path)
        if holder is not None and self._me.is_later_start_than(holder):
            logger.warning("taking over the lease of %s, an earlier start of this job", holder)
        elif holder is not None and is_alive_here(holder) is not False:
            if is_alive_here(holder) or _beats(self.path, holder, self.heartbeat_seconds):
                raise _refusal(self.path, holder)
            logger.warning("taking over the lease of %s, which shows no sign of life", holder)
        try:
            self._write()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}", hint="is the disk full, or the folder read-only?"
            ) from error
        if holder is not None:  # another job may be taking over in the same moment: the last one to write has it
            time.sleep(min(1.0, self.heartbeat_seconds))
            if not self.still_held():
                raise _refusal(self.path, read_lease(self.path) or self._me)
        threading.Thread(target=self._keep_alive, name="lease", daemon=True).start()

    def still_held(self) -> bool:
        """False when another job took the lease over: this one must not write any more."""
        holder = read_lease(self.path)
        return holder is not None and self._counts_as_mine(holder)

    def _counts_as_mine(self, holder: Holder) -> bool:
        """An earlier start of this job may have been about to write its beat when its lease was taken."""
        return holder.token == self._me.token or self._me.is_later_start_than(holder)

    def lost(self) -> CheckpointError:
        """What to say when it is no longer held."""
        return CheckpointError(
            f"{self.path} was taken over by {read_lease(self.path) or 'another job'}; this one stops without touching "
            "the folder",
            hint="see megatron-cpt status; two jobs must not share a run folder",
        )

    def release(self) -> None:
        self._released.set()
        if self.still_held():
            self.path.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._released.wait(self.heartbeat_seconds):
            holder = read_lease(self.path)
            if holder is None:  # storage that cannot be read just now says nothing; a save looks again
                continue
            if not self._counts_as_mine(holder):
                self._on_lost(self.lost())
                return
            self._me = replace(self._me, beat=self._me.beat + 1)
            with contextlib.suppress(OSError):  # a full disk or a storage hiccup: the next beat tries again
                self._write()

    def _write(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.{self._me.token}")
        partial.write_text(json.dumps(asdict(self._me)))
        partial.replace(self.path)
