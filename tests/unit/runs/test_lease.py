from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.lease import (
    Holder,
    Lease,
    is_alive_here,
    is_superseded,
    read_lease,
    refuse_if_held,
    refuse_if_held_here,
)

BEAT = 0.05


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lease.json"


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    holder = Holder("token", "node7", 4242, "another boot", "1", "99")
    return replace(holder, **changes)  # type: ignore[arg-type]


def test_held_while_held(path: Path) -> None:
    lease = Lease(path, BEAT)
    lease.acquire()
    assert lease.still_held()
    with pytest.raises(CheckpointError, match=f"written by process {os.getpid()}"):
        Lease(path, BEAT).acquire()
    with pytest.raises(CheckpointError, match="is being written"):
        refuse_if_held_here(path)
    lease.release()
    assert not path.exists()
    refuse_if_held_here(path)
    Lease(path, BEAT).acquire()


def test_a_dead_process_of_this_machine_is_replaced_at_once(path: Path) -> None:
    script = (
        "import sys, os, pathlib; from megatron_cpt.runs.lease import Lease;"
        "Lease(pathlib.Path(sys.argv[1])).acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    dead = read_lease(path)
    assert dead is not None
    assert is_alive_here(dead) is False
    lease = Lease(path, BEAT)
    lease.acquire()
    assert lease.still_held()
    # a later process that was given the same id is not the holder
    mine = read_lease(path)
    assert mine is not None and is_alive_here(mine)
    assert is_alive_here(replace(mine, process_started="1")) is False


def test_a_silent_holder_elsewhere_is_replaced(path: Path) -> None:
    path.write_text(json.dumps(asdict(elsewhere())))
    lease = Lease(path, BEAT)
    lease.acquire()
    assert lease.still_held()


@contextlib.contextmanager
def beating(path: Path, holder: Holder) -> Iterator[None]:
    """`holder` beats in the file, whoever else writes to it."""
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.is_set():
            count += 1
            write(path, replace(holder, beat=count))
            time.sleep(BEAT)

    thread = threading.Thread(target=beat)
    thread.start()
    while not path.exists():
        time.sleep(0.01)
    try:
        yield
    finally:
        over.set()
        thread.join()


def write(path: Path, holder: Holder) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(asdict(holder)))
    partial.replace(path)


def test_a_beating_holder_elsewhere_is_respected(path: Path) -> None:
    with beating(path, elsewhere()), pytest.raises(CheckpointError, match="node7, job 99"):
        Lease(path, BEAT).acquire()


@pytest.fixture
def second_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process belongs to job 99, which Slurm has started again once."""
    for name, value in (("JOB_ID", "99"), ("RESTART_COUNT", "1"), ("CLUSTER_NAME", "virtual")):
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.usefixtures("second_start")
def test_a_later_start_of_a_job_takes_the_lease_over_at_once_from_a_rank_that_beats(path: Path) -> None:
    with beating(path, elsewhere(cluster="virtual")):
        refuse_if_held(path, heartbeat_seconds=3600)  # would be watched for hours
        lease = Lease(path, BEAT)
        lease.acquire()
        for _ in range(20):  # whatever the other one still writes
            assert lease.still_held()
            time.sleep(BEAT / 4)
    time.sleep(4 * BEAT)
    holder = read_lease(path)
    assert holder is not None and (holder.restart, holder.pid) == (1, os.getpid())
    lease.release()
    assert not path.exists()


@pytest.mark.usefixtures("second_start")
@pytest.mark.parametrize(
    "other",
    [
        elsewhere(cluster="another"),
        elsewhere(cluster="virtual", job="98"),
        elsewhere(cluster="virtual", job=None),
        elsewhere(cluster="virtual", restart=1),
        elsewhere(cluster="virtual", restart=2),
    ],
)
def test_only_an_earlier_start_of_the_same_job_gives_way(path: Path, other: Holder) -> None:
    with beating(path, other):
        with pytest.raises(CheckpointError, match="is being written by process 4242 on node7"):
            refuse_if_held(path, BEAT)
        with pytest.raises(CheckpointError, match="is being written by process 4242 on node7"):
            Lease(path, BEAT).acquire()
    assert is_superseded(path) is (other.restart == 2)


@pytest.mark.usefixtures("second_start")
def test_who_is_cut_off_is_told_that_a_later_start_took_over(path: Path) -> None:
    told: list[CheckpointError] = []
    lease = Lease(path, BEAT, on_lost=told.append)
    lease.acquire()
    path.unlink()  # storage that does not answer is no other job
    time.sleep(4 * BEAT)
    assert not told and not lease.still_held() and not is_superseded(path)
    write(path, elsewhere(cluster="virtual", restart=2))
    deadline = time.monotonic() + 20
    while not told:
        assert time.monotonic() < deadline
        time.sleep(BEAT / 4)
    assert "was taken over by process 4242 on node7, job 99" in told[0].message
    assert not lease.still_held() and is_superseded(path)
    lease.release()
    assert path.exists()


def test_who_lost_the_lease_knows_and_leaves_it_alone(path: Path) -> None:
    lease = Lease(path, BEAT)
    lease.acquire()
    path.write_text(json.dumps(asdict(elsewhere())))
    assert not lease.still_held()
    time.sleep(3 * BEAT)  # its heartbeat has stopped
    lease.release()
    holder = read_lease(path)
    assert holder is not None and holder.token == "token"


def test_a_torn_lease_counts_as_none(path: Path) -> None:
    path.write_text('{"token": "x"')
    assert read_lease(path) is None
    Lease(path, BEAT).acquire()
