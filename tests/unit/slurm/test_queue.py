"""Slurm's view of a run."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.commands.status import slurm_lines
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.slurm.journal import record
from megatron_cpt.slurm.preflight import exclude
from megatron_cpt.slurm.queue import slurm_view

ROWS = """12|PENDING|Resources||2026-01-01T00:00:00|1:00:00
11|RUNNING|None|node[1-2]|2026-01-01T00:00:00|10:00
10|COMPLETED|None|node1|2026-01-01T00:00:00|INVALID"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with two starts; its jobs are 10 to 12."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/call\ncat <<E\n{ROWS}\nE\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
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


def test_a_run_that_was_never_submitted_has_no_view(tmp_path: Path) -> None:
    assert slurm_view(RunFolder(tmp_path)) is None


def test_without_slurm_the_journal_is_shown_all_the_same(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    view = slurm_view(folder)
    assert view is not None and view.problem == "squeue is not on this machine" and len(view.restarts) == 3


def test_a_controller_that_fails_is_a_line_of_the_status(folder: RunFolder) -> None:
    (folder.root / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    view = slurm_view(folder)
    assert view is not None and "Unable to contact" in (view.problem or "")


def test_status_of_a_folder_that_is_no_run_stays_one_clear_error(tmp_path: Path) -> None:
    from megatron_cpt.commands.status import status
    from megatron_cpt.errors import CheckpointError

    done = CliRunner().invoke(status, [str(tmp_path)])
    assert isinstance(done.exception, CheckpointError)
