"""What a run does when steps, saves, disks, peers or people stop it; real ranks, faults injected by the tests."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FINISHED, HUNG, STOPPED, USER_ERROR
from megatron_cpt.runs.metrics import read_metrics
from tests.configs import tiny_run
from tests.rank_pool import RankPool


class Job:
    """One run folder with its config."""

    def __init__(self, pool: RankPool, inputs: Path, folder: Path, steps: int, **sections: Any) -> None:
        self.pool, self.run, self.log = pool, folder / "run", folder / "log"
        self.path = folder / "config.yaml"
        data = {"validation": {"held_out": str(inputs / "held_out")}, "cache_dir": str(inputs / "index_cache")}
        self.raw = tiny_run(
            inputs,
            run_dir=str(self.run),
            budget={"train_tokens": 256 * steps},
            batch={"micro_batch_size": 2, "global_batch_size": 4},
            optimizer={"lr": 1e-3, "min_lr": 1e-4},
            data=data,
            checkpoint={"save_every": "4 iters", "async_save": False, "keep_last": 3},
        )
        self.raw |= sections
        self.path.write_text(yaml.safe_dump(self.raw))

    def start(self, *overrides: str, ranks: int = 1, faults: str = "", **env: str) -> list[int]:
        faults = ",".join(f"tests.faults:{name}" for name in faults.split(",") if name)
        return self.pool.start(self.path, *overrides, ranks=ranks, log=self.log, env={"TEST_FAULT": faults, **env})

    def train(self, *overrides: str, **kwargs: Any) -> int:
        self.start(*overrides, **kwargs)
        (code,) = set(self.pool.wait())
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.run / "metrics.jsonl") if row.get("event") == name]

    def steps(self) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.run / "metrics.jsonl") if "event" not in row]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def told(self) -> dict[str, Any]:
        """The error that rank 0 left for the process that started it."""
        told: dict[str, Any] = json.loads((self.run / "logs" / "error_rank_0000.json").read_text())
        return told


def test_bad_steps_are_skipped_with_their_documents(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=30)
    assert job.train(faults="nan_gradients,loss_spikes", NAN_STEPS="3", SPIKE_STEPS="26") == FINISHED
    skipped = job.events("skipped")
    assert [(row["iteration"], row["reason"].split(":")[1].strip()) for row in skipped] == [
        (3, "not finite"),
        (26, "loss spike"),
    ]
    assert [row["iteration"] for row in job.steps() if row["skipped"]] == [3, 26]
    for row in skipped:
        assert len(row["samples"]) == 4
        assert all(sample["source"] == "data" and sample["documents"] for sample in row["samples"])
        assert [sample["sample"] for sample in row["samples"]] == list(
            range(4 * (row["iteration"] - 1), 4 * row["iteration"])
        )


@pytest.mark.parametrize("distributed", [True, False])
def test_a_first_step_that_is_skipped_leaves_nothing_to_save_and_later_saves_whole(
    distributed: bool, pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    parallel = {"distributed_optimizer": distributed}
    checkpoint = {"save_every": "1 iters", "keep_last": 2}
    job = Job(pool, inputs, tmp_path, steps=4, parallel=parallel, checkpoint=checkpoint, schedule={"kind": "constant"})
    assert job.train(faults="nan_gradients", NAN_STEPS="1") == FINISHED
    assert ["every step so far was skipped" in row["reason"] for row in job.events("save_failed")] == [True]
    whole = {row["iteration"]: row["loss"] for row in job.steps()}
    shutil.rmtree(job.run / "checkpoints" / "iter_0000004")
    assert job.train() == FINISHED  # step 4 again, with the moments that steps 2 and 3 left
    assert {row["iteration"]: row["loss"] for row in job.steps()} == whole


def test_a_checkpoint_that_cannot_be_loaded_is_left_alone(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=4, parallel={"distributed_optimizer": False})
    assert job.train() == FINISHED
    ((path, marker),) = complete_checkpoints(job.run / "checkpoints")
    foreign = dataclasses.replace(marker, optimizer_sharding="fully_reshardable", sha256={})
    (path / "complete.json").write_text(json.dumps(foreign.to_json()))
    parallel = ["parallel.distributed_optimizer=true", "budget.train_tokens=2048"]
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes().replace(b"exp_avg_sq", b"exp_avg_qs"))
    assert job.train(*parallel) == USER_ERROR
    message = job.told()["message"]
    assert "cannot load checkpoint" in message and "optimizer.state.exp_avg_sq" in message and "is missing" in message
    assert (path / "complete.json").is_file() and len(list(path.glob("*.distcp"))) > 0


def test_repeated_bad_steps_roll_back_and_then_stop_for_good(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    failure = {"skips_before_rollback": 3, "max_rollbacks": 1}
    job = Job(pool, inputs, tmp_path, steps=24, failure=failure)
    assert job.train(faults="nan_gradients", NAN_STEPS="10,11,12,18,19,20") == DO_NOT_RESTART
    (rolled_back,) = job.events("rolled_back")
    assert (rolled_back["iteration"], rolled_back["checkpoint_iteration"]) == (12, 8)
    assert [row["iteration"] for row in job.events("diverged")] == [20]
    # after the rollback the data went on: each step has its own samples
    assert [row["consumed_tokens"] for row in job.steps()] == [256 * n for n in range(1, 21)]
    # nothing to roll back to
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    early = Job(pool, inputs, fresh, steps=8, failure=failure)
    assert early.train(faults="nan_gradients", NAN_STEPS="1,2,3") == DO_NOT_RESTART


def test_switch_files_signals_and_the_wall_time_limit(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    parallel = {"gpus_per_node": 2, "pp": 2}
    job = Job(pool, inputs, tmp_path, steps=10_000, parallel=parallel, checkpoint={"save_every": None})
    job.raw["data"]["max_epochs"] = 1e9
    job.path.write_text(yaml.safe_dump(job.raw))
    pids = job.start(ranks=2)
    job.wait_for(lambda: (job.run / "metrics.jsonl").exists() and len(job.steps()) > 2)
    (job.run / "SAVE").touch()
    job.wait_for(lambda: len(complete_checkpoints(job.run / "checkpoints")) == 1)
    assert not (job.run / "SAVE").exists()
    os.kill(pids[1], signal.SIGTERM)  # a rank that is not 0
    assert pool.wait() == [STOPPED, STOPPED]
    assert "SIGTERM" in job.log.read_text()
    first = complete_checkpoints(job.run / "checkpoints")[0][1]
    assert first.iteration == job.steps()[-1]["iteration"]
    # the same command goes on from there, and the limit is reached by its first step
    assert job.train("failure.wall_time_minutes=0.0001", ranks=2) == STOPPED
    second = complete_checkpoints(job.run / "checkpoints")[0][1]
    assert second.iteration == first.iteration + 1
    assert second.attempt == first.attempt + 1
    job.start(ranks=2)
    job.wait_for(lambda: len(job.steps()) > second.iteration + 1)
    (job.run / "KILL").touch()
    assert pool.wait() == [DO_NOT_RESTART, DO_NOT_RESTART]
    assert complete_checkpoints(job.run / "checkpoints")[0][1] == second  # nothing was saved


def test_a_stuck_rank_is_ended_with_stacks(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    parallel = {"gpus_per_node": 2, "pp": 2}
    failure = {"step_timeout_minutes": 0.15, "eval_timeout_minutes": 0.5}
    job = Job(pool, inputs, tmp_path, steps=10_000, parallel=parallel, failure=failure, eval={"every": None})
    job.raw["data"]["max_epochs"] = 1e9
    job.path.write_text(yaml.safe_dump(job.raw))
    pids = job.start(ranks=2)
    job.wait_for(lambda: (job.run / "metrics.jsonl").exists() and len(job.steps()) > 2)
    os.kill(pids[1], signal.SIGSTOP)
    job.wait_for(lambda: (job.run / "logs" / "error_rank_0000.json").exists())
    os.kill(pids[1], signal.SIGKILL)
    assert pool.wait() == [HUNG, -signal.SIGKILL]
    log = job.log.read_text()
    assert "watchdog: no progress in phase 'step'" in log
    assert 'File "' in log and "run_schedule" in log  # the stack says where rank 0 waited
    assert job.told()["exit_code"] == HUNG


@pytest.mark.parametrize("fault", ["full_disk", "full_disk_at_the_marker"])
def test_a_full_disk_in_mid_save_loses_that_save_only(fault: str, pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    flag = tmp_path / "full"
    job = Job(pool, inputs, tmp_path, steps=12, checkpoint={"save_every": "4 iters", "async_save": True})
    job.start(faults=fault, FULL_DISK=str(flag))
    job.wait_for(lambda: bool(complete_checkpoints(job.run / "checkpoints")))
    flag.touch()
    (code,) = pool.wait()
    assert code == USER_ERROR
    assert "No space left" in job.told()["message"]
    newest = complete_checkpoints(job.run / "checkpoints")[0][1]
    assert newest.iteration < 12
    assert not list(job.run.glob("checkpoints/*.partial-*"))
    assert len(list(job.run.glob("checkpoints/iter_*"))) == len(complete_checkpoints(job.run / "checkpoints"))
    flag.unlink()
    assert job.train(faults=fault, FULL_DISK=str(flag)) == FINISHED
    assert complete_checkpoints(job.run / "checkpoints")[0][1].iteration == 12


def test_no_room_for_the_last_save_says_how_to_make_some(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=2)
    assert job.train(faults="no_free_bytes") == USER_ERROR
    told = job.told()
    assert "7 are free" in told["message"] and "free some space" in told["hint"] and "share" not in told["hint"]


def test_a_stop_whose_save_fails_says_so_and_keeps_the_checkpoint_before(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    flag = tmp_path / "full"
    job = Job(pool, inputs, tmp_path, steps=10_000, checkpoint={"save_every": "4 iters", "async_save": False})
    job.raw["data"]["max_epochs"] = 1e9
    job.path.write_text(yaml.safe_dump(job.raw))
    pids = job.start(faults="full_disk", FULL_DISK=str(flag))
    job.wait_for(lambda: bool(complete_checkpoints(job.run / "checkpoints")))
    flag.touch()
    os.kill(pids[0], signal.SIGTERM)
    assert pool.wait() == [USER_ERROR]
    assert "No space left" in job.told()["message"] and "disk full" in str(job.told()["hint"])
    saved = complete_checkpoints(job.run / "checkpoints")
    assert saved and not list(job.run.glob("checkpoints/*.partial-*"))
    flag.unlink()
    job.start()
    job.wait_for(lambda: complete_checkpoints(job.run / "checkpoints")[0][1].iteration > saved[0][1].iteration)
    (job.run / "STOP").touch()
    assert pool.wait() == [STOPPED]


def test_another_number_of_data_parallel_ranks_continues_the_run(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=8, schedule={"kind": "constant"})
    assert job.train() == FINISHED
    whole = {row["iteration"]: row["loss"] for row in job.steps()}
    shutil.rmtree(job.run / "checkpoints" / "iter_0000008")
    assert job.train("parallel.gpus_per_node=2", ranks=2) == FINISHED  # DP 1 -> 2 from iteration 4 on
    found = {row["iteration"]: row["loss"] for row in job.steps()}
    assert found.keys() == whole.keys()
    assert all(found[n] == pytest.approx(whole[n], abs=1e-6) for n in whole)
    starts = [row["world_size"] for row in job.events("start")]
    assert starts == [1, 2]


def test_one_rank_reads_the_users_file_and_all_hear_what_is_wrong_with_it(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    job = Job(pool, inputs, tmp_path, steps=2, parallel={"gpus_per_node": 2})
    text = job.path.read_text()
    job.path.unlink()
    os.mkfifo(job.path)  # it can be read once
    job.start(ranks=2)
    job.path.write_text(text)
    assert pool.wait() == [FINISHED, FINISHED]
    job.path.unlink()
    job.path.write_text(text + "optimiser: {}\n")
    job.start(ranks=2)
    assert pool.wait() == [USER_ERROR, USER_ERROR]
    assert job.log.read_text().count("did you mean") == 2


def test_a_port_in_use_is_one_clear_error(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=4, parallel={"gpus_per_node": 2})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        pids = job.start(ranks=2, MASTER_PORT=str(taken.getsockname()[1]))
        job.wait_for(lambda: "rank 0 cannot meet" in job.log.read_text())
        os.kill(pids[1], signal.SIGKILL)  # it waits for an answer from whoever has the port
        assert pool.wait() == [USER_ERROR, -signal.SIGKILL]
    log = job.log.read_text()
    assert "rank 0 cannot meet the others at 127.0.0.1" in log and "is the port in use" in log
    assert "Traceback" not in log


def test_a_damaged_checkpoint_falls_back_to_the_one_before(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=12)
    assert job.train() == FINISHED
    whole = {row["iteration"]: row["loss"] for row in job.steps()}
    saved = complete_checkpoints(job.run / "checkpoints")
    assert [marker.iteration for _, marker in saved] == [12, 8, 4]
    shard = next(saved[0][0].glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1  # one bit, and the size stays
    shard.write_bytes(raw)
    (saved[1][0] / "common.pt").write_bytes(b"x" * saved[1][1].file_bytes["common.pt"])
    assert job.train() == FINISHED
    log = job.log.read_text()
    assert "iter_0000012 is damaged (__0_" in log
    assert "iter_0000008 is damaged (common.pt has another sha256" in log
    assert {row["iteration"]: row["loss"] for row in job.steps()} == whole  # steps 5 to 12 once more, the same
    for path, _ in complete_checkpoints(job.run / "checkpoints"):
        (path / "metadata.json").unlink()
    assert job.train("budget.train_tokens=5000") == USER_ERROR
    assert "every checkpoint" in job.told()["message"]


def test_two_jobs_cannot_write_one_folder(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=10_000)
    job.raw["data"]["max_epochs"] = 1e9
    job.path.write_text(yaml.safe_dump(job.raw))
    other = RankPool()
    job.start()
    job.wait_for(lambda: (job.run / "lease.json").exists())
    assert other.run(job.path, ranks=1, log=tmp_path / "other.log") == [USER_ERROR]
    other.close()
    assert "is being written by process" in (tmp_path / "other.log").read_text()
    (job.run / "STOP").touch()
    job.wait_for(lambda: not (job.run / "lease.json").exists())
    assert pool.wait() == [STOPPED]


def test_a_run_starts_from_the_weights_of_another_run(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    job = Job(pool, inputs, tmp_path, steps=8)
    assert job.train() == FINISHED
    loss = {row["iteration"]: row["loss"] for row in job.events("validation")}
    second = tmp_path / "second"
    second.mkdir()
    follower = Job(pool, inputs, second, steps=4, model={"init_from": str(job.run), "check_start": False})
    shutil.rmtree(job.run / "checkpoints" / "iter_0000004")
    assert follower.train() == FINISHED
    first = follower.events("validation")[0]
    assert (first["iteration"], first["consumed_tokens"]) == (0, 0)
    assert first["loss"] == pytest.approx(loss[8], abs=1e-6)
    assert loss[0] - loss[8] > 0.05


def test_an_anneal_branches_off_a_stable_checkpoint_by_config_alone(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    """A wsd run of 8 steps; a branch at step 4 anneals over 4 more; both have the same samples at the same tokens."""
    stable = Job(pool, inputs, tmp_path, steps=8, schedule={"kind": "constant"})
    assert stable.train() == FINISHED
    branch_folder = tmp_path / "branch"
    branch_folder.mkdir()
    schedule = {"kind": "wsd", "decay_tokens": 4 * 256}
    checkpoint = {"branch_from": str(stable.run / "checkpoints" / "iter_0000004"), "save_every": None}
    branch = Job(pool, inputs, branch_folder, steps=8, schedule=schedule, checkpoint=checkpoint)
    assert branch.train() == FINISHED
    ours, theirs = branch.steps(), {row["iteration"]: row for row in stable.steps()}
    assert [row["iteration"] for row in ours] == [5, 6, 7, 8]
    assert [row["consumed_tokens"] for row in ours] == [theirs[n]["consumed_tokens"] for n in (5, 6, 7, 8)]
    assert ours[0]["loss"] == theirs[5]["loss"]  # the same weights on the same samples
    assert ours[0]["grad_norm"] == theirs[5]["grad_norm"]
    assert ours[-1]["lr"] < theirs[8]["lr"] / 2
    assert ours[-1]["loss"] != theirs[8]["loss"]
    # a batch that ramps up: the same budget in more steps
    ramp_folder = tmp_path / "ramp"
    ramp_folder.mkdir()
    batch = {**stable.raw["batch"], "global_batch_size": 8, "rampup_from": 4, "rampup_tokens": 1024}
    ramp = Job(pool, inputs, ramp_folder, steps=16, batch=batch)
    assert ramp.train() == FINISHED
    assert [row["global_batch_size"] for row in ramp.steps()] == [4, 4, 4, 4, 8, 8, 8, 8, 8, 8]
    missing = Job(pool, inputs, ramp_folder, steps=4, run_dir=str(tmp_path / "x"), checkpoint={"branch_from": "/no"})
    assert missing.train() == USER_ERROR
