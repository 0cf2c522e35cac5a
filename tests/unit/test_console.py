"""The console: progress is shown where it can be, and a console that is gone fails nothing."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from megatron_cpt import console
from megatron_cpt.console import ConsoleHandler, ProgressBar, SafeStream, format_seconds

REPO = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """A terminal that was closed: each write fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


class OnlyWrite:
    """The least that replaces sys.stderr in the wild: no flush, no isatty, no fileno."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def test_a_log_gets_amounts_rate_and_time_left_now_and_then_and_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), ProgressBar("convert", 4_000_000_000, "bytes") as bar:
        for seconds in (1, 12, 13):
            now = 100.0 + seconds
            bar.advance(1_000_000_000)
    assert [record.message for record in caplog.records] == [
        "convert: 2.00 of 4.00 GB (50 %), 0.17 GB/s, 0:12 left",
        "convert: 3.00 of 4.00 GB (75 %), 0.23 GB/s, 0:04 left",
    ]


def test_what_an_earlier_start_did_does_not_raise_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    bar = ProgressBar("", 1000, "tokens", done=800, stream=io.StringIO())
    now = 10.0
    bar.update(900, words=("iter 9",))
    assert bar.describe() == "iter 9: 900 of 1,000 tokens (90 %), 10 tokens/s, 0:10 left"


def test_work_that_failed_is_not_shown_as_done_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError), ProgressBar("x", 1, "tokens"):
        raise ZeroDivisionError
    assert not caplog.records


def test_a_terminal_gets_one_line_redrawn_and_other_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(console, "DRAW_SECONDS", 0.0)
    terminal = Terminal()
    with ProgressBar("eval", 100, "tokens", stream=terminal) as bar:
        bar.update(50)
        ConsoleHandler(io.StringIO()).emit(logging.LogRecord("x", logging.WARNING, "", 0, "a line", (), None))
    written = terminal.getvalue()
    assert written.count("\n") == 2 and written.endswith("\n")
    above, last, _ = written.split("\n")
    assert above.endswith(f"{console.CLEAR_LINE}WARNING a line")
    assert last.startswith(f"{console.CLEAR_LINE}[############------------] eval: 50 of 100 tokens (50 %)")
    terminal.truncate(0)
    ConsoleHandler(terminal).emit(logging.LogRecord("x", logging.INFO, "", 0, "later", (), None))
    assert terminal.getvalue().strip("\0") == "later\n"


@pytest.mark.parametrize("columns", [3, 24, 40, 59, 60, 79, 100, 200])
@pytest.mark.parametrize(
    "words", [(), ("iter 120000/715255", "loss 2.1234", "245,000 tok/s", "lr 0.0001"), ("validating " + "name" * 30,)]
)
def test_a_line_fits_its_terminal_with_the_time_left_in_it(
    columns: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    bar = ProgressBar("a label", 3_000_000_000, "tokens", stream=io.StringIO())
    now = 40_000.0
    bar.update(1_500_000_000, words=words)
    line = bar.fit(columns)
    assert len(line) <= columns
    if columns >= 24:
        assert line.endswith(("50 %, 11:06:40 left", f"-] {bar.describe()}"))
    if columns >= 79 and len(words) > 1:
        assert "iter 120000/715255, loss 2.1234, " in line and "[#####" in line


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_a_line_is_as_long_as_the_terminal_that_shows_it_though_stdout_is_a_file(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal, ProgressBar("a long label " * 20, 100, "tokens", stream=terminal):
        pass
    shown = os.read(ours, 4096).decode().replace("\r\n", "").split(console.CLEAR_LINE)
    os.close(ours)
    assert max(map(len, shown)) == columns - 1 and shown[-1].endswith(", 0 %")


@pytest.mark.parametrize(
    "error", [OSError(5, "EIO"), BrokenPipeError(), ValueError("closed file"), RuntimeError("odd")]
)
def test_a_console_that_fails_is_switched_off_and_nothing_is_raised(error: Exception) -> None:
    broken = Broken(error)
    with ProgressBar("x", 10, "bytes", stream=broken, log_seconds=0) as bar:
        bar.advance(5)
        bar.line("text")
    ConsoleHandler(broken).emit(logging.LogRecord("x", logging.INFO, "", 0, "text", (), None))
    assert broken.writes == 2  # one of the bar, one of the handler


@pytest.mark.parametrize("stderr", [None, OnlyWrite()])
def test_any_object_or_none_may_stand_in_the_place_of_stderr(
    monkeypatch: pytest.MonkeyPatch, stderr: OnlyWrite | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar("x", 10, "bytes") as bar:
        bar.advance(10)
    ConsoleHandler().emit(logging.LogRecord("x", logging.INFO, "", 0, "text", (), None))
    assert stderr is None or stderr.text == "text\n"


def test_threads_may_advance_one_bar() -> None:
    bar = ProgressBar("x", 4000, "bytes", stream=Terminal())
    bar.start()
    threads = [threading.Thread(target=lambda: [bar.advance(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    bar.close()
    assert "0.00 of 0.00 MB (100 %)" in bar.describe()


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "0:09"), (754, "12:34"), (3723, "1:02:03")])
def test_seconds_are_written_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_safe_stream_passes_on_what_else_is_asked_of_a_stream() -> None:
    assert SafeStream(sys.__stdout__).encoding == sys.__stdout__.encoding  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        SafeStream(io.StringIO()).write(b"")  # type: ignore[arg-type]


def test_a_terminal_closed_in_mid_work_is_no_error() -> None:
    """A real pseudo-terminal whose other end goes away: writes give EIO."""
    script = (
        "import sys, time\n"
        "from megatron_cpt.console import ProgressBar\n"
        "from megatron_cpt import console\n"
        "console.DRAW_SECONDS = 0\n"
        "with ProgressBar('x', 10, 'bytes') as bar:\n"
        "    print('started', flush=True)\n"
        "    sys.stdin.read()\n"
        "    for _ in range(10): bar.advance(1)\n"
        "print('done', bar._console.failure.errno, flush=True)\n"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=REPO,
        text=True,
    )
    os.close(theirs)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    assert b"[-" in os.read(ours, 1000)
    os.close(ours)
    out, _ = child.communicate("")
    assert out == "done 5\n"
