"""Faults of a real cluster: each run ends by itself, with the losses of the undisturbed run, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.rank_errors import read_rank_errors
from megatron_cpt.slurm.preflight import exclude
from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import Job, clean_up

MANY = "budget.train_tokens=5M"  # a run that does not end within a test


def test_told_before_its_time_limit_it_saves_and_starts_itself_again(job: Job, undisturbed: dict[int, float]) -> None:
    job.submit()
    job.wait_for_step(15)
    job.cluster.ask("scancel", "--batch", "--signal=USR1", job.job)
    assert job.ended() == 0, job.describe()
    assert job.losses() == undisturbed
    assert job.causes() == ["saved and stopped after signal SIGUSR1", "the budget is trained and saved"]
    assert job.status()["steps_done_twice"] == 0
    starts = job.status()["slurm"]["restarts"]
    assert [(start["restart"], start["action"]) for start in starts] == [(0, "requeue"), (1, "leave")]

    attempts = job.run.history.read_text()
    job.sbatch()  # a finished run is known by its flag: no rank is started
    assert job.ended() == 0 and job.run.history.read_text() == attempts


def test_a_killed_rank_starts_the_job_again(job: Job, undisturbed: dict[int, float]) -> None:
    job.submit()
    job.wait_for_step(15)
    os.kill(job.ranks(job.cluster.nodes_of(job.job)[1])[0], signal.SIGKILL)
    assert job.ended() == 0, job.describe()
    assert job.losses() == undisturbed
    assert job.journal("ended")[0]["action"] == "requeue"


def test_a_rank_that_dies_while_the_controller_is_down_starts_the_job_again(
    job: Job, undisturbed: dict[int, float]
) -> None:
    """Nobody answers scontrol then; the job's script asks until somebody does."""
    job.submit()
    job.wait_for_step(15)
    rank = job.ranks(job.cluster.nodes_of(job.job)[1])[0]
    job.cluster.kill_controller()
    try:
        os.kill(rank, signal.SIGKILL)
        log = job.run.logs / f"slurm-{job.job}.log"
        until(lambda: "Unable to contact" in log.read_text(), "the script has asked in vain", 60, log.read_text)
    finally:
        job.cluster.start_controller()
    assert job.ended() == 0, job.describe()
    assert job.losses() == undisturbed
    assert [event["action"] for event in job.journal("ended")] == ["requeue", "leave"]


def test_of_two_jobs_that_are_submitted_at_once_one_trains_and_the_other_stops(job: Job) -> None:
    (first,) = job.submit(MANY)  # so long that the slower one to start finds the other still training
    jobs = {first, job.sbatch()}

    def failed() -> list[str]:
        return [name for name in jobs if job.cluster.job_state(name) == "FAILED"]

    until(failed, "one of them has ended", 180, job.describe)
    (loser,) = failed()
    (trains,) = jobs - {loser}
    assert job.ended(loser) == 2, job.describe()
    starts = {start["job"]: start["cause"] for start in job.status()["slurm"]["restarts"]}
    assert "is being written by process" in starts[loser]
    until(lambda: len(job.steps()) >= 5, "the other one trains", 180, job.describe)
    (job.run.root / "STOP").touch()
    assert job.ended(trains) == 75, job.describe()
    iterations = [row["iteration"] for row in job.steps()]
    assert iterations == list(range(1, len(iterations) + 1))


@dataclass
class Loss:
    """A run that loses one of its nodes as soon as it has saved a checkpoint."""

    job: Job
    number: int  # 0: the node of the batch script and of rank 0
    cut_off: bool  # else its power is switched off
    node: str = ""

    def strike(self) -> None:
        self.node = self.job.cluster.nodes_of(self.job.job)[self.number]
        assert self.job.ranks(self.node)
        (self.job.cluster.partition if self.cut_off else self.job.cluster.power_off)(self.node)

    def mend(self) -> None:
        if self.node:
            (self.job.cluster.heal if self.cut_off else self.job.cluster.boot)(self.node)


@pytest.fixture(scope="module")
def losses_of_nodes(cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loss]:
    """Three runs that each lose a node, at the same time: Slurm needs most of a minute to notice and to start again."""
    cases = {
        name: Loss(Job(cluster, inputs, tmp_path_factory.mktemp("loss")), number, cut_off)
        for name, number, cut_off in (("first", 0, False), ("other", 1, False), ("cut off", 0, True))
    }

    def all_struck() -> bool:
        for case in cases.values():
            if not case.node and case.job.has_reached(15):
                case.strike()
        return all(case.node for case in cases.values())

    cut = cases["cut off"]
    try:
        for case in cases.values():
            case.job.submit()
        until(all_struck, "every run has lost a node", 240, cut.job.describe)
        until(lambda: len(cut.job.journal("began")) == 2, "the job has started on other nodes", 180, cut.job.describe)
        until(lambda: cut.job.ranks(cut.node) == [], "the ranks that are cut off have ended", 90, cut.job.describe)
        for case in cases.values():
            assert case.job.ended() == 0, case.job.describe()
    finally:
        for case in cases.values():
            case.mend()
        clean_up(cluster)
    return cases


@pytest.mark.parametrize("which", ["first", "other"])
def test_a_node_without_power_is_replaced_by_a_spare_one(
    losses_of_nodes: dict[str, Loss], undisturbed: dict[int, float], which: str
) -> None:
    job, lost = losses_of_nodes[which].job, losses_of_nodes[which].node
    assert job.losses() == undisturbed
    starts = job.status()["slurm"]["restarts"]
    assert len(starts) >= 2 and lost in starts[0]["nodes"] and lost not in starts[-1]["nodes"]
    assert starts[0]["cause"], starts


def test_a_node_that_is_cut_off_loses_the_run_to_other_nodes_and_stops_without_touching_it(
    losses_of_nodes: dict[str, Loss], undisturbed: dict[int, float]
) -> None:
    """It still sees the storage, so its rank 0 keeps the lease alive until the job starts again."""
    job = losses_of_nodes["cut off"].job
    told = read_rank_errors(job.run.logs / f"job-{job.job}-0")
    assert any("was taken over by process" in error.message for error in told), told
    assert job.losses() == undisturbed
    assert [event["restart"] for event in job.journal("ended")] == [1]
    assert job.status()["last_error"] is None and not list(job.run.logs.glob("failure_rank_*.json"))


def test_a_restart_of_slurmd_does_not_disturb_the_run(job: Job, undisturbed: dict[int, float]) -> None:
    job.submit()
    job.wait_for_step(15)
    node = job.cluster.nodes_of(job.job)[1]
    job.cluster.kill_slurmd(node)
    job.cluster.start_slurmd(node)
    assert job.ended() == 0, job.describe()
    assert (job.losses(), len(job.journal("began"))) == (undisturbed, 1)


def test_a_preempted_job_may_take_longer_to_save_than_slurm_waits_for_a_killed_one(
    job: Job, undisturbed: dict[int, float]
) -> None:
    """A rank is held for longer than KillWait (5 s), within the grace time of preemption (60 s).

    Slurm wakes a rank (SIGCONT) before it tells it, so it is held again and again.
    """
    job.submit()
    job.wait_for_step(15)
    nodes = job.cluster.nodes_of(job.job)
    held = job.ranks(nodes[1])[0]
    os.kill(held, signal.SIGSTOP)
    urgent = job.cluster.ask(
        "sbatch", "--parsable", "-p", "urgent", "--exclusive", f"--nodelist={','.join(nodes)}", "--nodes=2",
        "--output=/dev/null", "--wrap=sleep 2",
    )  # fmt: skip
    until(lambda: not is_stopped(held), "Slurm has woken the rank to tell it", 60, job.describe)
    told = time.monotonic()
    while time.monotonic() - told < 10:
        os.kill(held, signal.SIGSTOP)
        time.sleep(0.02)
    assert job.ranks(nodes[1]) == [held] and job.cluster.job_state(job.job) == "RUNNING", job.describe()
    os.kill(held, signal.SIGCONT)
    assert job.cluster.exit_code(urgent) == 0
    assert job.ended() == 0, job.describe()
    assert job.losses() == undisturbed
    assert "saved and stopped after signal SIG" in job.causes()[0]
    assert job.status()["steps_done_twice"] == 0


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_rank_that_makes_no_progress_is_ended_by_the_watchdog_and_the_job_starts_again(
    job: Job, undisturbed: dict[int, float]
) -> None:
    job.submit("failure.step_timeout_minutes=0.1")
    job.wait_for_step(15)
    os.kill(job.ranks(job.cluster.nodes_of(job.job)[1])[0], signal.SIGSTOP)
    assert job.ended() == 0, job.describe()
    assert job.losses() == undisturbed
    assert job.causes()[0].startswith("no progress in phase 'step'")


def test_a_node_that_fails_its_check_is_left_out(job: Job, undisturbed: dict[int, float]) -> None:
    """And so stays a node that was left out before."""
    bad, worse = job.cluster.nodes[1:3]
    job.run.root.mkdir()
    exclude(job.run, {worse: "fans"})
    job.cluster.ask("mount", "-t", "tmpfs", "tmpfs", str(job.inputs / "model"), host=bad)
    try:
        job.submit()
        assert job.ended() == 0, job.describe()
    finally:
        job.cluster.ask("umount", str(job.inputs / "model"), host=bad)
    assert job.losses() == undisturbed
    first, last = job.journal("began")
    assert bad in first["nodes"] and not {bad, worse} & set(last["nodes"])
    assert set(job.status()["slurm"]["excluded_nodes"]) == {bad, worse}
    assert job.causes()[0].startswith(f"preflight: {bad}: ")


def test_a_mistake_of_the_user_does_not_start_again_and_ends_the_queued_successors(job: Job) -> None:
    job.submit()
    job.cluster.ask("scancel", job.job)
    first = job.sbatch("--hold", arguments=("budget.train_tokns=1",))
    second = job.cluster.ask(
        "sbatch", "--parsable", f"--dependency=afterany:{first}", str(job.run.root / "submit.sbatch")
    )
    other = job.cluster.ask(
        "sbatch",
        "--parsable",
        f"--dependency=afterany:{first}",
        "--job-name=other",
        "--output=/dev/null",
        "--wrap=true",
    )
    job.cluster.ask("scontrol", "release", first)
    assert job.ended(first) == 2
    assert job.ended(second, 30) == 0 and job.cluster.job_state(second) == "CANCELLED"
    assert job.ended(other) == 0 and job.cluster.job_state(other) == "COMPLETED"
    assert job.cluster.job_field(first, "Restarts") == "0"


def test_a_run_that_diverges_does_not_start_again_and_ends_the_queued_successors(job: Job) -> None:
    first, second = job.submit(
        "--chain", "2", "optimizer.lr=1e30", "failure.skips_before_rollback=1", "failure.max_rollbacks=0"
    )
    assert job.ended(first) == 76, job.describe()
    assert job.ended(second, 30) == 0 and job.cluster.job_state(second) == "CANCELLED"
    assert job.status()["state"] == "diverged" and "skipped" in job.causes()[0]


def test_a_chain_continues_with_its_next_job_when_the_time_of_one_is_over(
    job: Job, undisturbed: dict[int, float]
) -> None:
    first, second = job.submit("--chain", "2")
    job.wait_for_step(15)
    assert job.status()["state"] == "running"
    job.cluster.ask("scancel", "--batch", "--signal=USR1", first)
    assert job.ended(first) == 75
    assert job.ended(second) == 0, job.describe()
    assert job.losses() == undisturbed
    assert [event["job"] for event in job.journal("began")] == [first, second]


def test_restarts_have_a_limit_and_fewer_are_made_without_progress(
    job: Job, cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two runs at once, whose ranks are killed again and again; one saves between, the other never does."""
    limited, stuck = job, Job(cluster, inputs, tmp_path_factory.mktemp("stuck"))
    limited.submit("--max-restarts", "1", MANY)
    stuck.submit("checkpoint.save_every=null", MANY)
    for attempt in (1, 2, 3):
        for run, step in ((limited, 12 * attempt), (stuck, 2)):
            if attempt < 3 or run is stuck:
                run.wait_for_step(step, attempt)
                os.kill(run.ranks(cluster.nodes_of(run.job)[1])[0], signal.SIGKILL)
    assert (limited.ended(), stuck.ended()) == (76, 76), limited.describe() + stuck.describe()
    assert limited.causes()[-1].startswith("started again 1 times, the limit")
    assert stuck.causes()[-1].startswith("3 starts in a row completed no checkpoint")
    assert [event["action"] for event in stuck.journal("ended")] == ["requeue", "requeue", "leave"]


def test_switch_files_save_stop_and_keep_from_starting(job: Job) -> None:
    job.submit("checkpoint.save_every=null", MANY)
    job.wait_for_step(5)
    (job.run.root / "SAVE").touch()
    until(lambda: len(complete_checkpoints(job.run.checkpoints)) == 1, "a checkpoint was saved", 60, job.describe)
    (job.run.root / "STOP").touch()
    assert job.ended() == 75, job.describe()
    assert job.causes()[-1].startswith("stopped by the file ") and job.status()["state"] == "stopped"
    (job.run.root / "KILL").touch()
    attempts = job.run.history.read_text()
    job.sbatch()
    assert job.ended() == 76 and job.run.history.read_text() == attempts


def test_a_queued_run_says_what_it_waits_for(job: Job) -> None:
    _, second = job.submit("--chain", "2", MANY)
    job.wait_for_step(5)
    (waiting,) = [entry for entry in job.status()["slurm"]["jobs"] if entry["job"] == second]
    assert (waiting["state"], waiting["reason"]) == ("PENDING", "Dependency")
    job.cluster.ask("scancel", second, job.job)
    until(lambda: job.status()["slurm"]["jobs"] == [], "both jobs are gone", 60, job.describe)
    by_hand = job.cluster.call("sbatch", "--parsable", "--hold", "submit.sbatch", cwd=job.run.root).stdout.strip()
    # its ranks may be saving for some seconds after the queue has forgotten the job
    until(lambda: job.status()["state"] == "queued", "the run is known to be queued", 60, job.describe)
    (waiting,) = job.status()["slurm"]["jobs"]
    assert (waiting["job"], waiting["reason"]) == (by_hand, "JobHeldUser")
    refused = job.submit_command()
    assert refused.returncode == 2 and f"has a job in the queue: {by_hand}" in refused.stderr


def test_a_cancelled_job_does_not_come_back(job: Job, cluster: Cluster) -> None:
    job.submit(MANY)
    job.wait_for_step(5)
    cluster.ask("scancel", job.job)
    until(lambda: cluster.job_state(job.job) == "CANCELLED", "it is cancelled", 60, job.describe)
    time.sleep(5)
    assert cluster.job_state(job.job) == "CANCELLED" and len(job.journal("began")) == 1
    assert Path(job.run.root).is_dir()
