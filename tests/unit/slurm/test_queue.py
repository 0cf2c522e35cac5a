"""Slurm's view of a run."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.commands.status import slurm_lines
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.slurm.journal import read_journal, record, restarts
from megatron_cpt.slurm.preflight import exclude
from megatron_cpt.slurm.queue import slurm_view, waiting_jobs
from megatron_cpt.slurm.site import Site

HEADER = "JOBID|STATE|REASON|NODELIST|START_TIME|TIME_LEFT|COMMAND"
ROWS = f"""{HEADER}
12|PENDING|Resources||2026-01-01T00:00:00|1:00:00|/old/submit.sbatch
11|RUNNING|None|node[1-2]|2026-01-01T00:00:00|10:00|/old/submit.sbatch
10|COMPLETED|None|node1|2026-01-01T00:00:00|INVALID|/old/submit.sbatch"""


def write_squeue(folder: Path, text: str) -> None:
    path = folder / "squeue"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with two starts; its jobs are 10 to 12."""
    write_squeue(tmp_path, f'echo "$*" > {tmp_path}/call\ncat <<E\n{ROWS}\nE\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = RunFolder(tmp_path)
    for job in ("10", "11", "12"):
        record(found, "submitted", job=job, script="submit.sbatch")
    record(found, "began", job="10", restart=0, nodes=["node1", "node3"], attempts=0, consumed_tokens=0, before=None)
    record(found, "ended", job="10", restart=0, cause="preflight: node3: GPUs", action="requeue", exit_code=1)
    record(found, "began", job="10", restart=1, nodes=["node1", "node2"], attempts=0, consumed_tokens=0, before=None)
    record(
        found,
        "began",
        job="11",
        restart=0,
        nodes=["node1", "node2"],
        attempts=1,
        consumed_tokens=64,
        before="node2 is down",
    )
    exclude(found, {"node3": "GPUs: 7 of 8"})
    return found


def test_a_view_has_the_jobs_in_the_queue_and_every_start_with_its_cause(folder: RunFolder) -> None:
    view = slurm_view(folder)
    assert view is not None and view.problem is None
    assert [(job.job, job.state, job.nodes) for job in view.jobs] == [
        ("12", "PENDING", ""),
        ("11", "RUNNING", "node[1-2]"),
    ]
    assert [(start["job"], start["restart"], start["cause"]) for start in view.restarts] == [
        ("10", 0, "preflight: node3: GPUs"), ("10", 1, "node2 is down"), ("11", 0, None),
    ]  # fmt: skip
    assert "--jobs=10,11,12" in (folder.root / "call").read_text()
    assert not view.waits  # job 11 runs
    lines = "\n".join(slurm_lines(view))
    for words in ("12 waits: Resources", "11 running on node[1-2], 10:00 left", "node3: GPUs: 7 of 8", "started again"):
        assert words in lines
    assert view.to_json()["excluded_nodes"] == {"node3": "GPUs: 7 of 8"}


def test_of_two_jobs_that_ran_at_once_each_ends_its_own_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for job in ("1", "2"):
        record(run, "began", job=job, restart=0, nodes=["n"], attempts=0, consumed_tokens=0, before=None)
    record(run, "ended", job="1", restart=0, cause="trained", action="leave", exit_code=0)
    record(run, "ended", job="3", restart=0, cause="refused before it began", action="leave", exit_code=76)
    assert [start["cause"] for start in restarts(read_journal(run))] == ["trained", None]


def test_a_run_that_was_never_submitted_has_no_view(tmp_path: Path) -> None:
    assert slurm_view(RunFolder(tmp_path)) is None


def test_a_job_that_was_submitted_by_hand_is_known_by_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "runs" / "a | b")
    run.root.mkdir(parents=True)
    (run.root / "submit.sbatch").touch()
    (tmp_path / "other.sbatch").touch()
    row = "{}|PENDING|Priority||N/A|1:00:00|{}"
    rows = [row.format(7, run.root / "submit.sbatch"), row.format(8, tmp_path / "other.sbatch"), row.format(9, "")]
    write_squeue(tmp_path, "cat <<E\n" + "\n".join([HEADER, *rows]) + "\nE")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    view = slurm_view(run)
    assert view is not None and view.waits and [job.job for job in view.jobs] == ["7"]
    assert waiting_jobs(run, Site()) == ["7"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1", "squeue: Unable to contact"),
        ("exit 1", "squeue: exit code 1"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        (f"echo 'Welcome!'; echo '{HEADER}'", None),
        ("echo 'Welcome!'", "squeue did not answer with a list of jobs, but 'Welcome!'"),
        ("", "squeue did not answer with a list of jobs, but ''"),
        (f"echo '{HEADER}'; echo '12|RUNN'", f"squeue did not answer with a list of jobs, but '{HEADER} 12|RUNN'"),
    ],
)
def test_what_squeue_says_is_one_sentence(folder: RunFolder, text: str, problem: str | None) -> None:
    write_squeue(folder.root, text)
    view = slurm_view(folder)
    assert view is not None and (view.jobs, view.problem) == ([], problem)


def test_a_squeue_that_does_not_answer_is_said_so(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_squeue(folder.root, "exec sleep 60")
    monkeypatch.setattr("megatron_cpt.slurm.queue._SECONDS", 0.2)
    view = slurm_view(folder)
    assert view is not None and view.problem == "squeue did not answer within 0.2 seconds"


def test_without_slurm_the_journal_is_shown_all_the_same(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    view = slurm_view(folder)
    assert view is not None and view.problem == "squeue is not on this machine" and len(view.restarts) == 3


def test_status_of_a_folder_that_is_no_run_stays_one_clear_error(tmp_path: Path) -> None:
    from megatron_cpt.commands.status import status
    from megatron_cpt.errors import CheckpointError

    done = CliRunner().invoke(status, [str(tmp_path)])
    assert isinstance(done.exception, CheckpointError)
