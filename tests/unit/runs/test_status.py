"""`status` and `checkpoints` on run folders written by hand."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli import cli, run
from megatron_cpt.config.load import build_config
from megatron_cpt.runs.checkpoints import checkpoint_path, seal
from megatron_cpt.runs.folder import RunFolder, record_attempt, resolved_yaml
from megatron_cpt.runs.lease import Lease, refuse_if_held
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.metrics import MetricsFile


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = build_config(
        {
            "job_name": "job",
            "run_dir": str(tmp_path),
            "model": {"init_from": "m"},
            "budget": {"train_tokens": 10_000},
            "batch": {"seq_length": 100, "global_batch_size": 10},
        }
    )
    made = RunFolder(tmp_path)
    made.logs.mkdir()
    made.checkpoints.mkdir()
    made.resolved.write_text(resolved_yaml(config))
    record_attempt(made, [])
    return made


def write_steps(folder: RunFolder, start: int, iterations: range) -> MetricsFile:
    metrics = MetricsFile(folder.metrics, start)
    for n in iterations:
        metrics.write(
            iteration=n,
            consumed_tokens=1000 * n,
            loss=3.0 - n / 10,
            loss_by_source={},
            skipped=n == 3,
            tokens_per_second=500.0,
            eta_seconds=20.0 - 2 * n,
        )
    return metrics


def write_checkpoint(folder: RunFolder, iteration: int, loss: float = 1.0) -> Path:
    partial = folder.checkpoints / f"iter_{iteration:07d}.partial-1"
    partial.mkdir()
    (partial / "common.pt").write_text("x" * 1000)
    marker = Marker(
        iteration, 1000 * iteration, {}, {"tp": 1}, "fully_reshardable", 1, "now", {}, validation={"held_out": loss}
    )
    seal(partial, checkpoint_path(folder.checkpoints, iteration), "", marker)
    return checkpoint_path(folder.checkpoints, iteration)


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run(cli, list(argv))
    streams = capsys.readouterr()
    return int(caught.value.code or 0), streams.out + streams.err


def state(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out = call(capsys, "status", str(folder.root), "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_run_from_its_start_to_its_end(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert state(folder, capsys)["state"] == "not_started"
    lease = Lease(folder.lease)
    lease.acquire()
    write_steps(folder, 1, range(1, 7))
    write_checkpoint(folder, 4)
    found = state(folder, capsys)
    assert (found["state"], found["iteration"], found["consumed_tokens"], found["train_tokens"]) == (
        "running",
        6,
        6000,
        10_000,
    )
    assert found["last_checkpoint"]["iteration"] == 4
    assert (found["activity"], found["tokens_per_second"], found["eta_seconds"]) == ("training", 500.0, 8.0)
    assert "left" in call(capsys, "status", str(folder.root))[1]
    lease.release()
    assert state(folder, capsys)["state"] == "interrupted"
    # the second start repeats steps 5 and 6
    record_attempt(folder, [])
    metrics = write_steps(folder, 2, range(5, 11))
    metrics.write(event="validation", iteration=10, name="held_out", loss=1.5)
    metrics.write(event="finished", iteration=10)
    found = state(folder, capsys)
    assert (found["state"], found["starts"], found["steps_done_twice"], found["skipped_steps"]) == ("finished", 2, 2, 1)
    assert found["validation_loss"] == {"held_out": 1.5}
    code, out = call(capsys, "status", str(folder.root))
    assert code == 0
    assert "10,000 of 10,000 (100.0%)" in out and "2 steps done twice" in out
    assert "tokens/s" not in out and found["tokens_per_second"] is None  # a run that has ended has no rate
    assert "last update       0:00 ago" in out


def test_a_running_job_says_what_it_does(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease(folder.lease)
    lease.acquire()
    assert state(folder, capsys)["activity"] == "starting"
    metrics = write_steps(folder, 1, range(1, 11))
    assert state(folder, capsys)["activity"] == "saving"  # the budget is trained
    metrics.write(event="validating", iteration=10, name="held_out")
    code, out = call(capsys, "status", str(folder.root))
    assert code == 0 and "running: validating held_out" in out and "left" not in out
    record_attempt(folder, [])
    assert state(folder, capsys)["activity"] == "starting"
    lease.release()


def test_a_clock_that_jumps_changes_no_state(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A step, then an hour back, then the end of the run; and an error before the clock's beginning."""
    write_steps(folder, 1, range(1, 3)).close()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    end = rows[-1] | {"event": "finished", "time": rows[-1]["time"] - 3600}
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, end]))
    assert state(folder, capsys)["state"] == "finished"
    folder.metrics.write_text("".join(json.dumps(row | {"time": row["time"] + 3600}) + "\n" for row in rows))
    found = state(folder, capsys)
    assert (found["state"], found["last_row_seconds_ago"]) == ("interrupted", 0.0)
    folder.rank_error(0).write_text(json.dumps({"message": "out of memory", "hint": None, "exit_code": 1}))
    os.utime(folder.rank_error(0), (0, 0))
    assert state(folder, capsys)["state"] == "failed"


def test_a_failure_is_quoted(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_steps(folder, 1, range(1, 3))
    folder.rank_error(1).write_text(json.dumps({"message": "out of memory", "hint": None, "exit_code": 1}))
    os.utime(folder.rank_error(1), (time.time() + 5,) * 2)
    found = state(folder, capsys)
    assert (found["state"], found["last_error"]) == ("failed", "out of memory")


def test_not_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "checkpoints"):
        code, out = call(capsys, command, str(tmp_path))
        assert code == 2
        assert "hint:" in out


def test_checkpoints_are_listed_verified_and_pruned(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {n: write_checkpoint(folder, n) for n in (1, 2, 3, 4, 5)}
    (folder.checkpoints / "iter_0000006.partial-1").mkdir()
    (folder.checkpoints / "best.json").write_text(json.dumps({"iteration": 2, "name": "held_out", "value": 1.0}))
    code, out = call(capsys, "checkpoints", str(folder.root))
    assert code == 0
    assert out.count("iter_") == 5 and out.count("best") == 1
    (paths[3] / "common.pt").write_text("short")
    assert call(capsys, "checkpoints", str(folder.root))[0] == 0
    code, out = call(capsys, "checkpoints", str(folder.root), "--verify")
    assert code == 1 and "damaged: common.pt has 5 bytes instead of 1,000" in out
    code, out = call(
        capsys, "checkpoints", str(folder.root), "--prune", "--keep-last", "1", "--keep-every", "3k", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert [row["iteration"] for row in found["checkpoints"]] == [2, 3, 5]
    assert len(found["removed"]) == 2
    assert not list(folder.checkpoints.glob("*.partial-*"))
    assert call(capsys, "checkpoints", str(folder.root), "--prune", "--keep-every", "x")[0] == 2


def test_prune_keeps_what_the_runs_own_config_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = {"job_name": "job", "model": {"init_from": "m"}, "checkpoint": {"keep_last": 2, "keep_every": 2000}}
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for n in range(1, 7):
        write_checkpoint(folder, n)
    code, out = call(capsys, "checkpoints", str(tmp_path), "--prune")
    assert code == 2 and "it has no resolved.yaml" in out and len(list(folder.checkpoints.glob("iter_*"))) == 6
    folder.resolved.write_text(resolved_yaml(build_config(raw)))
    code, out = call(capsys, "checkpoints", str(tmp_path), "--prune", "--json")
    found = json.loads(out)
    assert [row["iteration"] for row in found["checkpoints"]] == [2, 4, 5, 6]
    assert found["retention"] == {"keep_last": 2, "keep_every_tokens": 2000, "phase_ends": []}
    code, out = call(capsys, "checkpoints", str(tmp_path), "--prune", "--keep-every", "none")
    assert code == 0 and "--keep-every instead of the run's config" in out
    assert out.count("removed") == 2
    code, out = call(capsys, "checkpoints", str(tmp_path), "--keep-last", "1")
    assert code == 2 and "add --prune" in out


def test_prune_refuses_while_a_marker_cannot_be_understood(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (1, 2, 3, 4):
        write_checkpoint(folder, n)
    marker = folder.checkpoints / "iter_0000002" / "complete.json"
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 7'))
    code, out = call(capsys, "checkpoints", str(folder.root), "--prune")
    assert code == 2 and "format 7" in out and "hint:" in out
    assert len(list(folder.checkpoints.glob("iter_*"))) == 4
    code, out = call(capsys, "checkpoints", str(folder.root))
    assert code == 1 and "iter_0000002  cannot be used and is kept" in out


def test_a_running_job_is_not_pruned(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder, 1)
    lease = Lease(folder.lease)
    lease.acquire()
    code, out = call(capsys, "checkpoints", str(folder.root), "--prune")
    assert code == 2 and "is being written" in out
    lease.release()


def test_what_a_crash_left_half_written_does_not_hide_the_rest(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = write_steps(folder, 1, range(1, 3))
    metrics.write(
        iteration=3, consumed_tokens=3000, loss=float("nan"), loss_by_source={}, skipped=True, tokens_per_second=1.0,
        eta_seconds=9.0,
    )  # fmt: skip
    metrics.close()
    with folder.metrics.open("a") as file:
        file.write('7\n{"iterat')
    folder.rank_error(0).write_text('{"message": "di')
    checkpoint = write_checkpoint(folder, 2)
    (checkpoint / "complete.json").write_text(
        (checkpoint / "complete.json").read_text().replace('"consumed_tokens": 2000', '"consumed_tokens": "many"')
    )
    with pytest.raises(SystemExit) as ended:
        run(cli, ["status", str(folder.root)])
    text = capsys.readouterr().out
    assert not ended.value.code
    assert "loss              not finite" in text and "was cut short" in text
    assert "consumed_tokens is 'many'" in text  # the checkpoint is not hidden
    with pytest.raises(SystemExit):
        run(cli, ["status", str(folder.root), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["iteration"], told["loss"], told["skipped_steps"]) == (3, None, 1)


def test_prune_does_not_touch_the_folder_of_a_job_on_another_machine(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unfinished save looks abandoned from here."""
    unfinished = folder.checkpoints / "iter_0000009.partial-1"
    unfinished.mkdir()
    lease = Lease(folder.lease, 0.05)
    lease._me = dataclasses.replace(lease._me, host="node7", process_space="another boot")
    lease.acquire()
    monkeypatch.setattr(
        "megatron_cpt.commands.checkpoints.refuse_if_held", functools.partial(refuse_if_held, heartbeat_seconds=0.1)
    )
    with pytest.raises(SystemExit) as refused:
        run(cli, ["checkpoints", str(folder.root), "--prune"])
    assert refused.value.code == 2 and "on node7" in capsys.readouterr().err
    assert unfinished.is_dir()
    lease.release()
    with pytest.raises(SystemExit) as pruned:
        run(cli, ["checkpoints", str(folder.root), "--prune"])
    assert not pruned.value.code and not unfinished.exists()


def test_status_without_a_folder_lists_the_runs_below_runs(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    place = tmp_path.parent / f"{tmp_path.name}-place"
    for name in ("runs/first", "runs/group/second"):
        shutil.copytree(folder.root, place / name)
        (place / name / "checkpoints" / "deep").mkdir(parents=True)
    os.utime(place / "runs/first/resolved.yaml", (1, 1))
    broken = place / "runs/broken"
    broken.mkdir()
    (broken / "resolved.yaml").write_text("nonsense: [")
    monkeypatch.chdir(place)

    with pytest.raises(SystemExit):
        run(cli, ["status", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [entry["run_dir"] for entry in listed] == ["runs/broken", "runs/group/second", "runs/first"] or [
        entry["run_dir"] for entry in listed
    ] == ["runs/group/second", "runs/broken", "runs/first"]
    assert {entry["state"] for entry in listed} == {"not_started", "unreadable"}

    with pytest.raises(SystemExit):
        run(cli, ["status"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 and "not_started" in shown.out and "of 10K" in shown.out
    assert "runs/broken" in shown.err and "Traceback" not in shown.err

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(cli, ["status"])
    assert ended.value.code == 2 and "there is no folder runs" in capsys.readouterr().err
