"""Commands that the page starts. They outlive the server: a job is a folder, and its state is read from it.

ROOT/.web/jobs/ID/job.json     what was started, and by which process     ROOT/.web/jobs/ID/log
ROOT/.web/jobs/ID/exit.json    its exit code, once it has ended           ROOT/.web/jobs/ID/config.yaml
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import UserError
from megatron_cpt.runs.lease import process_started
from megatron_cpt.web.run_job import KILL_NOW

COMMAND = (sys.executable, "-m", "megatron_cpt")
_RUNNER = (sys.executable, "-m", "megatron_cpt.web.run_job")
_ID = re.compile(r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$")
_MOST_LOG_BYTES = 256 << 10  # of one answer


class JobRefused(UserError):
    """Another job works on the same thing."""


@dataclass(frozen=True)
class Job:
    """One started command.

    Attributes:
        target: the run folder or output that it writes; two jobs never share one.
        state: running, done, failed, or lost when its process vanished without leaving an exit code.
    """

    id: str
    kind: str
    title: str
    arguments: tuple[str, ...]
    target: str | None
    created: str
    state: str
    exit_code: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"command": " ".join(("megatron-cpt", *self.arguments))}


class Jobs:
    """The jobs of one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root / ".web" / "jobs"

    def start(
        self,
        kind: str,
        title: str,
        arguments: Sequence[str],
        target: Path | None = None,
        files: dict[str, str] | None = None,
    ) -> Job:
        """Start `megatron-cpt ARGUMENTS` in a session of its own, in the server's working directory.

        Args:
            kind: train, preprocess, ...
            title: what a list shows.
            arguments: of the command; `{job}` stands for the job's folder.
            target: what the job writes.
            files: name -> content, written into the job's folder first.

        Raises:
            JobRefused: a running job has the same target.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked(target):
            if target is not None:
                self._refuse_second(target)
            folder = self.root / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
            folder.mkdir()
            for name, content in (files or {}).items():
                write_atomically(folder / name, content.encode())
            arguments = [argument.replace("{job}", str(folder)) for argument in arguments]
            fields = {
                "kind": kind,
                "title": title,
                "arguments": arguments,
                "target": None if target is None else str(target),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            (folder / "log").touch()
            runner = subprocess.Popen(
                [*_RUNNER, str(folder), *COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the end of the server, or of its terminal, is not the job's
            )
            # The last word: without it the folder is not a job.
            process = {"pid": runner.pid, "process_started": process_started(runner.pid)}
            write_atomically(folder / "job.json", json.dumps(fields | process).encode())
        return self._read(folder)

    def listed(self) -> list[Job]:
        """Return all jobs, the newest first."""
        if not self.root.is_dir():
            return []
        folders = sorted((path for path in self.root.iterdir() if _ID.match(path.name)), reverse=True)
        found = []
        for folder in folders:
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(self._read(folder))
        return found

    def get(self, job_id: str) -> Job | None:
        """Return one job, None where there is none of this id."""
        if not _ID.match(job_id):
            return None
        try:
            return self._read(self.root / job_id)
        except (OSError, ValueError, KeyError):
            return None

    def log(self, job: Job, offset: int) -> tuple[str, int]:
        """Return the job's output behind byte `offset`, its last part where that is long, and where to read on."""
        return read_log(self.root / job.id / "log", offset)

    def stop(self, job: Job, *, hard: bool = False) -> bool:
        """Ask the job's command to end, as Ctrl-C does; `hard` ends it at once. Return whether it was there."""
        told = self._told(self.root / job.id)
        if job.state != "running":
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(told["pid"], KILL_NOW if hard else signal.SIGINT)
        return True

    @contextlib.contextmanager
    def _locked(self, target: Path | None) -> Iterator[None]:
        """One start at a time for one target, over all servers of this root."""
        name = "start" if target is None else hashlib.sha256(str(target).encode()).hexdigest()[:16]
        with (self.root / f".lock-{name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _refuse_second(self, target: Path) -> None:
        for job in self.listed():
            if job.state == "running" and job.target == str(target):
                raise JobRefused(f"{job.title} was started already and is running", hint="look at it, or stop it first")

    def _told(self, folder: Path) -> dict[str, Any]:
        told = json.loads((folder / "job.json").read_text())
        assert isinstance(told, dict)
        return told

    def _read(self, folder: Path) -> Job:
        told = self._told(folder)
        try:
            code: int | None = json.loads((folder / "exit.json").read_text())["exit_code"]
        except FileNotFoundError:
            code = None
        if code is not None:
            state = "done" if code == 0 else "failed"
        else:
            alive = told["process_started"] is not None and process_started(told["pid"]) == told["process_started"]
            state = "running" if alive else "lost"
        return Job(
            id=folder.name,
            kind=told["kind"],
            title=told["title"],
            arguments=tuple(told["arguments"]),
            target=told["target"],
            created=told["created"],
            state=state,
            exit_code=code,
        )


def read_log(path: Path, offset: int) -> tuple[str, int]:
    """Return a log behind byte `offset`, its last part where that is long, and the offset to read on from."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if offset > size:  # another file
                offset = 0
            file.seek(max(offset, size - _MOST_LOG_BYTES))
            read = file.read(_MOST_LOG_BYTES)
            return read.decode("utf-8", "replace"), file.tell()
    except OSError:
        return "", 0
