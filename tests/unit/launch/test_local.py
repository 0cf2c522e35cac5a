"""Ranks as processes: exit codes, messages, signals. The ranks are small scripts."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
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


def test_stop_signals_before_a_rank_is_up_count_as_stopped(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "print('ready', flush=True)\ntime.sleep(60)")  # the signal's default action ends it
    assert run_while(folder, lambda: os.kill(os.getpid(), signal.SIGTERM), ranks=1) == 75


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(
        monkeypatch,
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)",
    )

    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while "Press Ctrl-C again" not in caplog.text:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(local.StoppedAtOnce) as caught:
        run_while(folder, press_twice, ranks=2)
    assert caught.value.exit_code == 130 and "continues" in str(caught.value.hint)
    assert "saves at the end of this step" in caplog.text


def test_a_signal_that_is_ignored_stays_ignored(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup megatron-cpt train` survives its terminal."""
    use(monkeypatch, "print('ready', flush=True)\ntime.sleep(0.5)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_while(folder, lambda: os.kill(os.getpid(), signal.SIGHUP), ranks=1) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def run_while(folder: RunFolder, action: Callable[[], None], ranks: int) -> int:
    """Run ranks, and `action` in a thread once all of them have printed `ready`."""

    def when_ready() -> None:
        while not all(folder.rank_log(r).exists() and "ready" in folder.rank_log(r).read_text() for r in range(ranks)):
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=when_ready)
    thread.start()
    try:
        return local.run_ranks(folder, [], ranks)
    finally:
        thread.join()


def test_ranks_run_from_a_thread_and_write_to_a_stderr_without_a_descriptor(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "os.write(int(os.environ['MEGATRON_CPT_CONSOLE_FD']), b'step 1\\n')")
    notebook, codes = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", notebook)
    thread = threading.Thread(target=lambda: codes.append(local.run_ranks(folder, [], 1)))
    thread.start()
    thread.join()
    assert codes == [0] and notebook.getvalue() == "step 1\n"


def test_without_a_stderr_ranks_run_all_the_same(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "sys.exit('MEGATRON_CPT_CONSOLE_FD' in os.environ)")
    monkeypatch.setattr(sys, "stderr", None)
    assert local.run_ranks(folder, [], 1) == 0


def test_last_words_are_of_this_attempt_and_without_chatter(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback of an earlier attempt\n")
    before = log.stat().st_size
    chatter = "2026-01-01 10:00:00,000 INFO [rank 0] megatron.core.datasets.gpt_dataset: > total number of samples: 9\n"
    with log.open("a") as file:
        file.write(chatter * 30 + "2026-01-01 10:00:00,000 INFO [rank 0] megatron_cpt.train.rank: opening the data\n")
        file.write("RuntimeError: out of memory\n" + chatter * 30)
    words = local.last_words(log, before)
    assert [line.strip()[-16:] for line in words.splitlines()] == ["opening the data", "or: out of memory"[-16:]]
    assert local.last_words(log, log.stat().st_size) == "  (nothing in this attempt)"
