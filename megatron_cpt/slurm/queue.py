"""Slurm's view of a run, for `status`: its jobs in the queue, and its restarts with their causes."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.slurm.journal import Event, read_journal, restarts
from megatron_cpt.slurm.preflight import excluded_nodes

_SECONDS = 10  # status must answer, whatever the controller does
_WAITING = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm knows. `reason` says why it waits, `nodes` where it runs."""

    job: str
    state: str
    reason: str
    nodes: str
    starts_at: str
    time_left: str


@dataclass(frozen=True)
class SlurmView:
    jobs: list[QueuedJob]
    restarts: list[Event]
    excluded_nodes: dict[str, str]
    problem: str | None  # why Slurm could not be asked

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def waits(self) -> bool:
        """Whether a job is in the queue and none runs."""
        states = {job.state for job in self.jobs}
        return "PENDING" in states and not states & {"RUNNING", "CONFIGURING"}


def slurm_view(folder: RunFolder) -> SlurmView | None:
    """What Slurm and the run's journal say; None for a run that was never submitted to Slurm."""
    events = read_journal(folder)
    if not events:
        return None
    jobs, problem = _ask(_job_ids(events))
    return SlurmView(jobs, restarts(events), excluded_nodes(folder), problem)


def waiting_jobs(folder: RunFolder) -> list[str]:
    """Ids of the run's jobs that are queued or running."""
    jobs, _ = _ask(_job_ids(read_journal(folder)))
    return [job.job for job in jobs]


def _job_ids(events: list[Event]) -> list[str]:
    return list(dict.fromkeys(str(event["job"]) for event in events if event.get("job")))[-50:]


def _ask(jobs: list[str]) -> tuple[list[QueuedJob], str | None]:
    if not jobs:
        return [], None
    if shutil.which("squeue") is None:
        return [], "squeue is not on this machine"
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%N|%S|%L", f"--jobs={','.join(jobs)}"],
            text=True,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"squeue: {error}"
    if done.returncode and "Invalid job id" not in done.stderr:  # the only job is long forgotten
        return [], f"squeue: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    rows = (line.split("|") for line in done.stdout.splitlines())
    return [QueuedJob(*row) for row in rows if len(row) == 6 and row[1] in _WAITING], None
