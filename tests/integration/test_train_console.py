"""The command at its terminal: it may be closed, or Ctrl-C may be pressed, and the run ends as it should."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.status import read_status
from tests.configs import write_tiny_run


@contextmanager
def command(config: Path, stderr: int, *, nohup: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """`megatron-cpt train` as a shell with job control starts it in the background."""
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    train = [sys.executable, "-m", "megatron_cpt", "train", str(config)]
    process = subprocess.Popen(
        ["bash", "-c", "trap '' HUP; exec \"$@\"", "_", *train] if nohup else train,
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        env={**environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_steps(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not any("event" not in row for row in read_metrics(run / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_terminal_that_was_closed_does_not_end_the_run(inputs: Path, tmp_path: Path) -> None:
    """Under nohup every write to the terminal fails with EIO; all steps are trained and the last is saved."""
    config = write_tiny_run(
        tmp_path,
        model={"init_from": str(inputs / "model")},
        data={"train": [{"name": "data", "prefix": str(inputs / "data")}]},
    )
    terminal, ours = pty.openpty()
    with command(config, ours, nohup=True) as process:
        os.close(ours)
        os.read(terminal, 1)
        os.close(terminal)
        assert process.wait(timeout=240) == 0
    found = read_status(tmp_path / "run")
    assert (found.state, found.iteration) == ("finished", 8)
    assert found.last_checkpoint is not None and found.last_checkpoint["iteration"] == 8


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "Ctrl-C (SIGINT)"), (signal.SIGHUP, "the end of the terminal (SIGHUP)")]
)
def test_a_signal_of_the_terminal_saves_and_says_what_it_was(
    number: signal.Signals, words: str, inputs: Path, tmp_path: Path
) -> None:
    config = write_tiny_run(
        tmp_path,
        model={"init_from": str(inputs / "model")},
        data={"train": [{"name": "data", "prefix": str(inputs / "data")}], "max_epochs": 1e9},
        budget={"train_tokens": 10**6},
    )
    log = tmp_path / "console"
    with log.open("wb") as console, command(config, console.fileno()) as process:
        wait_for_steps(tmp_path / "run", process)
        process.send_signal(number)
        assert process.wait(timeout=240) == 75, log.read_text()
    found = read_status(tmp_path / "run")
    assert (found.state, found.last_error) == ("stopped", None)
    assert found.last_checkpoint is not None and found.last_checkpoint["iteration"] == found.iteration
    text = log.read_text()
    assert f"stopping after {words}; start again to continue" in text
    assert "the run saves at the end of this step" in text
    assert ("Press Ctrl-C again to stop at once" in text) == (number == signal.SIGINT)
