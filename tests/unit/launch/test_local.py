"""Ranks as processes: exit codes, messages, signals. The ranks are small scripts."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_cpt.launch import local
from megatron_cpt.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    return run


def use(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(local, "RANK_COMMAND", (sys.executable, "-c", "import os, sys, time\n" + script))


def test_every_rank_knows_its_place_and_logs_apart(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        monkeypatch,
        "print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['MASTER_ADDR'], sys.argv[1:])\n"
        "if os.environ['RANK'] == '0': os.write(int(os.environ['MEGATRON_CPT_CONSOLE_FD']), b'')\n",
    )
    assert local.run_ranks(folder, ["config.yaml", "a=1"], 3) == 0
    for rank in range(3):
        assert folder.rank_log(rank).read_text().strip() == f"{rank} 3 127.0.0.1 ['config.yaml', 'a=1']"


def test_the_rank_that_said_why_is_quoted(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.rank_error(1)
    use(
        monkeypatch,
        f"if os.environ['RANK'] == '1':\n open({str(path)!r}, 'w').write("
        """'{"message": "no such shard", "hint": "copy it", "exit_code": 2}'); sys.exit(2)\n"""
        "time.sleep(60)",
    )
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.2)
    with pytest.raises(local.RankFailure, match="no such shard") as caught:
        local.run_ranks(folder, [], 2)
    assert (caught.value.hint, caught.value.exit_code) == ("copy it", 2)


def test_a_killed_rank_is_named_with_its_last_lines(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        monkeypatch,
        "print('the last words', flush=True)\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(900)",
    )
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(local.RankFailure, match="SIGKILL") as caught:
        local.run_ranks(folder, [], 2)
    assert time.monotonic() - started < 300  # the other rank was ended, it did not come to its end
    assert "the last words" in caught.value.message
    assert "continues" in str(caught.value.hint)


def test_a_signal_reaches_the_ranks_and_their_code_comes_back(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch,
        "import signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)",
    )

    def when_ready() -> None:
        while not all(folder.rank_log(r).exists() and "ready" in folder.rank_log(r).read_text() for r in (0, 1)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=when_ready)
    thread.start()
    assert local.run_ranks(folder, [], 2) == 75
    thread.join()


def test_a_port_that_no_outgoing_connection_takes() -> None:
    ports = {local.free_port() for _ in range(50)}
    assert all(15_000 <= port < 30_000 for port in ports)
    assert len(ports) > 40  # two jobs that start together hardly meet


def test_srun_ranks_get_torchruns_variables() -> None:
    slurm = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    adopted = local.adopt_slurm_ranks(slurm)
    assert adopted == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "20077"}
    assert local.under_launcher(adopted)
    assert local.adopt_slurm_ranks({**slurm, "RANK": "0"}) == {}  # torchrun under srun
    assert local.adopt_slurm_ranks({**slurm, "SLURM_NTASKS": "1"}) == {}
    assert not local.under_launcher({})
