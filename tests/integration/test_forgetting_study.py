"""The short version of the study of forgetting, as its command runs it, on a small random model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import apt

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".study" / "tiny"
SETTINGS = ["vanilla", "replay_25", "average_70", "average_50"]


def _study(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/forgetting_study/study.py", "--size", "tiny", "--seeds", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.fixture(scope="module")
def first() -> subprocess.CompletedProcess[str]:
    if shutil.which("apt-get") is None:
        pytest.skip("the fiction comes from a package of Debian")
    apt.update()
    shutil.rmtree(WORK, ignore_errors=True)
    done = _study("--only", "replay_25")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_every_setting_learns_the_same_tokens_of_the_domain(first: subprocess.CompletedProcess[str]) -> None:
    rows = {row["name"]: row for row in json.loads((WORK / "results.json").read_text())}
    assert list(rows) == SETTINGS
    assert {row["domain_tokens"] for row in rows.values()} == {57 * 128}
    assert rows["replay_25"]["train_tokens"] == 76 * 128
    for row in rows.values():
        assert set(row["before"]) == set(row["after"]) == {"medical", "facts", "reference", "fiction"}
        assert row["after"]["medical"] < row["before"]["medical"] - 1  # from random weights
    assert (
        rows["average_50"]["after"]["medical"]
        > rows["average_70"]["after"]["medical"]
        > rows["vanilla"]["after"]["medical"]
    )
    assert rows["replay_25"]["after"]["facts"] < rows["vanilla"]["after"]["facts"]


def test_the_results_are_a_table_a_page_and_a_picture(first: subprocess.CompletedProcess[str]) -> None:
    table = (WORK / "results.md").read_text()
    assert "| replay 25 % | 9,728 |" in table
    assert "replay 25 %" in (WORK / "results.html").read_text()
    assert (WORK / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "replay 25 %" in first.stdout


def test_what_is_finished_is_not_done_again_and_what_is_new_is(first: subprocess.CompletedProcess[str]) -> None:
    again = _study("--only", "replay_25")
    assert again.returncode == 0, again.stderr[-4000:]
    assert "$ megatron-cpt" not in again.stderr
    unknown = _study("--only", "replay_26")
    assert unknown.returncode == 2
    assert "replay_26" in unknown.stderr
    assert "replay_25" in unknown.stderr
