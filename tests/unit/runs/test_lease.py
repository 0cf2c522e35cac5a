from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.lease import Holder, Lease, is_alive_here, read_lease, refuse_if_held_here

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


def test_a_beating_holder_elsewhere_is_respected(path: Path) -> None:
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.is_set():
            count += 1
            partial = path.with_suffix(".new")
            partial.write_text(json.dumps(asdict(elsewhere(beat=count))))
            partial.replace(path)
            time.sleep(BEAT)

    thread = threading.Thread(target=beat)
    thread.start()
    while not path.exists():
        time.sleep(0.01)
    try:
        with pytest.raises(CheckpointError, match="node7, job 99"):
            Lease(path, BEAT).acquire()
    finally:
        over.set()
        thread.join()


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
