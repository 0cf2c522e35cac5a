"""What only several machines together can tell: who is there, one clock, one file system.

The first rank on each machine speaks for it. Every wait has an end: a rank that is dead or hangs is an error with its
number after ANSWER_SECONDS, and the others go on without it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_cpt.doctor.board import Board, gather
from megatron_cpt.doctor.check import Check

ANSWER_SECONDS = 60.0  # for a short answer of every rank
EXAMINATION_SECONDS = 600.0  # for all checks of a machine, which read its data
VISIBLE_SECONDS = 10.0  # a file may take that long to appear on another client of NFS
CLOCK_SECONDS = 1.0  # difference of two clocks, beyond what the exchange leaves unsure


class Node:
    """This process among those of the job. Every rank calls the same methods in the same order."""

    def __init__(
        self, board: Board, rank: int, world_size: int, host: str, *, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        """Tell the others who this is, and hear who they are."""
        self.board, self.rank, self.host, self.answer_seconds = board, rank, host, answer_seconds
        if rank == 0:
            board.put("job", uuid.uuid4().hex)
        board.put(f"host/{rank}", host)
        self.hosts = gather(board, "host", range(world_size), answer_seconds)
        self.missing = [other for other in range(world_size) if other not in self.hosts]
        first: dict[str, int] = {}
        for other, name in self.hosts.items():
            first.setdefault(name, other)
        self.speakers = sorted(first.values())

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its machine."""
        return self.rank in self.speakers

    def presence(self) -> Check:
        """Who answered; of use on rank 0."""
        looked_at = f"an answer of each of {len(self.hosts) + len(self.missing)} ranks within {self.answer_seconds:g} s"
        if self.missing:
            detail = f"no answer from rank {', '.join(map(str, self.missing))}"
            return Check("ranks", looked_at, "error", detail, "look at the log of that rank: is it alive?")
        names = ", ".join(self.hosts[rank] for rank in self.speakers)
        return Check("ranks", looked_at, "ok", f"all answered, on {len(self.speakers)} machines: {names}")

    def clocks(self, clock: Callable[[], float] = time.time) -> list[Check]:
        """Compare the clock of each machine with rank 0's. Return the checks on rank 0, nothing elsewhere."""
        if self.rank != 0:
            if self.speaks and self.board.get(f"ping/{self.rank}", self.answer_seconds) is not None:
                self.board.put(f"pong/{self.rank}", repr(clock()))
            return []
        others = [rank for rank in self.speakers if rank != 0]
        if not others:
            return [Check("clocks", "nothing", "not checked", "there is one machine")]
        return [self._clock_of(rank, clock) for rank in others]

    def _clock_of(self, rank: int, clock: Callable[[], float]) -> Check:
        host = self.hosts[rank]
        before, started = clock(), time.monotonic()
        self.board.put(f"ping/{rank}", "")
        answer = self.board.get(f"pong/{rank}", self.answer_seconds)
        took = time.monotonic() - started
        looked_at = f"the clock of {host} against that of {self.host}"
        if answer is None:
            detail = f"rank {rank} did not answer within {self.answer_seconds:g} s"
            return Check("clocks", looked_at, "error", detail, "look at its log: is it alive?")
        offset, unsure = float(answer) - (before + took / 2), took / 2
        detail = f"{offset:+.3f} s, known to {unsure:.3f} s"
        if abs(offset) - unsure > CLOCK_SECONDS:
            hint = "logs of the nodes cannot be compared; let chrony or ntpd set the clocks"
            return Check("clocks", looked_at, "warning", detail, hint)
        return Check("clocks", looked_at, "ok", detail)

    def shared_folder(self, folder: Path) -> list[Check]:
        """Write a file on each machine and look for those of the others. Return the check on rank 0."""
        job = self.board.get("job", self.answer_seconds)
        if not self.speaks or job is None:
            return []
        mine = folder / f".doctor-{job}-{self.rank}"
        try:
            failure = _write(mine, job)
            self.board.put(f"written/{self.rank}", failure)
            written = gather(self.board, "written", self.speakers, self.answer_seconds)
            told = [rank for rank, fault in written.items() if not fault]
            unseen = _unseen({rank: folder / f".doctor-{job}-{rank}" for rank in told}, job)
            self.board.put(f"unseen/{self.rank}", json.dumps(unseen))
            answers = gather(self.board, "unseen", self.speakers, self.answer_seconds + VISIBLE_SECONDS)
        finally:
            mine.unlink(missing_ok=True)
        return [self._shared(folder, written, {rank: json.loads(text) for rank, text in answers.items()})]

    def _shared(self, folder: Path, written: dict[int, str], unseen: dict[int, list[int]]) -> Check:
        looked_at = f"a file of each of {len(self.speakers)} machines in {folder}, read by each"
        if len(self.speakers) == 1:
            return Check("shared folder", looked_at, "not checked", "there is one machine")
        faults = [f"{self.hosts[rank]} cannot write it: {fault}" for rank, fault in written.items() if fault]
        faults += [f"{self.hosts[rank]} did not answer" for rank in self.speakers if rank not in unseen]
        faults += [
            f"{self.hosts[reader]} does not see the file of {', '.join(self.hosts[rank] for rank in ranks)}"
            for reader, ranks in unseen.items()
            if ranks
        ]
        if faults:
            hint = "set run_dir, the data and the model to folders on a file system that all nodes mount"
            return Check("shared folder", looked_at, "error", "; ".join(faults), hint)
        return Check("shared folder", looked_at, "ok", "every machine sees the files of all")

    def collect(self, mine: Sequence[Check], timeout_seconds: float = EXAMINATION_SECONDS) -> list[Check]:
        """Return the checks of all machines on rank 0, each with its host; elsewhere hand over `mine`."""
        if self.rank != 0:
            self.board.put(f"checks/{self.rank}", json.dumps([asdict(check) for check in mine]))
            return []
        others = [rank for rank in self.speakers if rank != 0]
        answers = gather(self.board, "checks", others, timeout_seconds)
        found = [replace(check, host=self.host) for check in mine]
        for rank in others:
            host = self.hosts[rank]
            if rank in answers:
                found += [Check(**{**fields, "host": host}) for fields in json.loads(answers[rank])]
            else:
                detail = f"no report from rank {rank} within {timeout_seconds:g} s"
                found.append(Check("machine", "all its checks", "error", detail, "look at its log", host))
        return found


def _write(path: Path, text: str) -> str:
    """Write the file. Return why it could not be written, or nothing."""
    try:
        path.write_text(text)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _unseen(files: dict[int, Path], text: str) -> list[int]:
    """Ranks whose file does not hold `text` within VISIBLE_SECONDS."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    left = dict(files)
    while True:
        left = {rank: path for rank, path in left.items() if not _holds(path, text)}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        time.sleep(0.2)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
