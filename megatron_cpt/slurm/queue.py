"""Slurm's view of a run, for `status`: its jobs in the queue, and its restarts with their causes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.errors import LaunchError
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.slurm.client import jobs_of
from megatron_cpt.slurm.journal import Event, read_journal, restarts
from megatron_cpt.slurm.preflight import excluded_nodes
from megatron_cpt.slurm.site import Site

_SECONDS = 10  # status must answer, whatever the controller does
_COLUMNS = "iTrNSLo"  # those of QueuedJob, then the path of the job's script
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
    """What Slurm and the run's journal say; None for a run that Slurm has nothing to do with."""
    events = read_journal(folder)
    if not events and not script_path(folder).is_file():
        return None
    jobs: list[QueuedJob] = []
    problem = None
    try:
        jobs = _jobs_of(folder, events, Site())
    except LaunchError as error:
        problem = error.message if "squeue" in error.message else f"squeue: {error.message}"
    return SlurmView(jobs, restarts(events), excluded_nodes(folder), problem)


def waiting_jobs(folder: RunFolder, site: Site) -> list[str]:
    """Ids of the run's jobs that are queued or running.

    Raises:
        LaunchError: Slurm does not say.
    """
    return [job.job for job in _jobs_of(folder, read_journal(folder), site)]


def script_path(folder: RunFolder) -> Path:
    """The batch script that `megatron-cpt submit` leaves in the run folder."""
    return folder.root / "submit.sbatch"


def _jobs_of(folder: RunFolder, events: list[Event], site: Site) -> list[QueuedJob]:
    """The run's jobs that are queued or running.

    A job of the journal is known by its id, whoever submitted it; one that was submitted by hand, and has not begun, by
    its script, among the jobs of this user.
    """
    known = list(dict.fromkeys(str(event["job"]) for event in events if event.get("job")))[-50:]
    script = script_path(folder).absolute()
    rows = jobs_of(f"--jobs={','.join(known)}", _COLUMNS, site, _SECONDS) if known else []
    if script.is_file():
        rows += [row for row in jobs_of("--me", _COLUMNS, site, _SECONDS) if Path(row[-1]) == script]
    return list({row[0]: QueuedJob(*row[:-1]) for row in rows if row[1] in _WAITING}.values())
