"""What machines find out about each other, here played by threads, and once by the ranks of torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_cpt.doctor import nodes
from megatron_cpt.doctor.check import Check
from megatron_cpt.doctor.nodes import Node
from tests.configs import write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

REPO = Path(__file__).resolve().parents[3]


class Blackboard:
    """A board within one process."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self.changed = threading.Condition()

    def put(self, key: str, text: str) -> None:
        with self.changed:
            self.messages[key] = text
            self.changed.notify_all()

    def get(self, key: str, timeout_seconds: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.messages, max(0.0, timeout_seconds))
            return self.messages.get(key)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "VISIBLE_SECONDS", 0.3)


def play(act: Callable[[Node], list[Check]], hosts: list[str], world_size: int | None = None) -> list[Check]:
    """Let each of `hosts` be a rank that acts; ranks up to `world_size` never come. Return what rank 0 found."""
    board = Blackboard()

    def one(rank: int) -> list[Check]:
        return act(Node(board, rank, world_size or len(hosts), hosts[rank], answer_seconds=1.0))

    with ThreadPoolExecutor(len(hosts)) as pool:
        first, *_ = pool.map(one, range(len(hosts)))
    return first


def test_a_folder_that_all_machines_see_is_shared_and_left_clean(tmp_path: Path) -> None:
    found = play(lambda node: node.shared_folder(tmp_path), ["a", "a", "b", "b", "c"])
    assert [check.verdict for check in found] == ["ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_another_one_on_each_machine_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    found = play(lambda node: node.shared_folder(tmp_path / node.host), ["a", "b"])
    assert [check.verdict for check in found] == ["error"]
    assert "a does not see the file of b" in found[0].detail and "b does not see the file of a" in found[0].detail


def test_a_folder_that_one_machine_cannot_write_is_an_error_with_the_reason(tmp_path: Path) -> None:
    found = play(lambda node: node.shared_folder(tmp_path if node.host == "a" else tmp_path / "lost"), ["a", "b"])
    assert found[0].verdict == "error"
    assert "b cannot write it: No such file or directory" in found[0].detail


@pytest.mark.parametrize(("skew_seconds", "verdict"), [(0.0, "ok"), (5.0, "warning"), (-5.0, "warning")])
def test_a_clock_that_is_wrong_is_a_warning_with_its_size(skew_seconds: float, verdict: str) -> None:
    found = play(lambda node: node.clocks(lambda: time.time() + (skew_seconds if node.rank else 0)), ["a", "b"])
    assert [check.verdict for check in found] == [verdict]
    assert float(found[0].detail.split()[0]) == pytest.approx(skew_seconds, abs=0.9)


def test_one_machine_has_nothing_to_compare() -> None:
    found = play(lambda node: [*node.clocks(), *node.shared_folder(REPO)], ["a", "a"])
    assert {check.verdict for check in found} == {"not checked"}


def test_a_rank_that_never_comes_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    def act(node: Node) -> list[Check]:
        return [node.presence(), *node.clocks(), *node.shared_folder(tmp_path)]

    started = time.monotonic()
    found = play(act, ["a", "b"], world_size=3)
    assert [check.verdict for check in found] == ["error", "ok", "ok"]
    assert "no answer from rank 2" in found[0].detail
    assert time.monotonic() - started < 30


def test_a_machine_that_hangs_in_its_checks_is_an_error_and_the_others_are_told() -> None:
    def act(node: Node) -> list[Check]:
        mine = [Check("disk", "it", "ok", node.host)]
        return [] if node.host == "b" else node.collect(mine, timeout_seconds=0.5)

    found = play(act, ["a", "b", "c"])
    assert [(check.host, check.verdict) for check in found] == [("a", "ok"), ("b", "error"), ("c", "ok")]


def test_ranks_of_torchrun_print_one_report_of_both_machines(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    config = write_tiny_run(tmp_path, parallel={"gpus_per_node": 2})
    script = tmp_path / "two_hosts.py"
    script.write_text(
        "import os, socket\n"
        "socket.gethostname = lambda: 'node' + os.environ['RANK']\n"
        "from megatron_cpt.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, "doctor", str(config), "--preflight", "--json"],
        cwd=REPO,
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    verdicts = {(check["host"], check["name"]): check["verdict"] for check in checks}
    assert verdicts[None, "ranks"] == verdicts[None, "shared folder"] == verdicts[None, "clocks"] == "ok"
    assert verdicts["node0", "dataset data"] == verdicts["node1", "dataset data"] == "ok"
    assert ("node0", "untrained tokens") in verdicts and ("node1", "untrained tokens") not in verdicts
    bandwidth = next(check for check in checks if check["name"] == "bandwidth")
    assert bandwidth["verdict"] == "ok" and "gloo" in bandwidth["looked_at"]
    assert "across 2 machines" in bandwidth["detail"] and "within" not in bandwidth["detail"]
    assert verdicts[None, "first loss"] == "not checked"  # model.check_start is false
    assert not (tmp_path / "run").exists()
