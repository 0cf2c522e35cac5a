"""What a person sees of long work: the one progress display, and output streams that cannot fail the work.

A terminal that was closed, a pipe whose reader left (`| head`) or a full disk behind `2> log` must not end a job of
hours. `SafeStream` therefore swallows the first failed write, remembers it in `failure` and writes no more.
Everything here goes through one: `ProgressBar`, `ConsoleHandler` and, in a command, stdout and stderr themselves
(`guarded_output`). Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, TextIO

OnTokens = Callable[[int, int], None]  # (tokens done, tokens in all)
Unit = Literal["bytes", "tokens", "ranks", "samples", "requests"]

LOG_SECONDS = 10.0  # between two lines of a progress bar in a log
DRAW_SECONDS = 0.1  # between two drawings on a terminal
BAR_CHARACTERS = 24
SHORT_BAR_CHARACTERS, COLUMNS_OF_A_BAR = 10, 60  # where the whole line does not fit; a narrower terminal has no bar
CLEAR_LINE = "\r\033[K"

log = logging.getLogger(__name__)


class SafeStream:
    """A text stream for a person to read: the first write that fails switches it off, and nothing is raised.

    `stream` may be None (Python's stderr after `2>&-`) or any object with a `write`. `failure` is the error, if any.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: Exception | None = None
        self.may_fail = False  # its failure is no failure of the command (`print_summary`)

    def write(self, text: str) -> int:
        """Write `text` if the stream still works. Return its length, as a text stream does."""
        if not isinstance(text, str):  # click asks by such a write whether a stream takes bytes
            raise TypeError(f"a text stream takes str, not {type(text).__name__}")
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def isatty(self) -> bool:
        return bool(self._call("isatty"))

    def _call(self, method: str, *args: str) -> Any:
        function = getattr(self._stream, method, None)
        if function is None or self.failure is not None:
            return None
        try:
            return function(*args)
        except Exception as error:  # a notebook or a user may have put any object in the place of stderr
            self.failure = error
            self.may_fail |= isinstance(error, BrokenPipeError)  # the reader has seen what it wanted
            return None

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would go past the guard
            raise AttributeError(name)
        return getattr(self._stream, name)


class ProgressBar:
    """How much of `total` is done, the rate and the time left: a bar on a terminal, a line now and then in a log.

    A context manager. All methods may be called from any thread, and none raises because of the console. `words` of
    an update are shown before the amounts, the most important one first: a terminal that is too narrow for all loses
    the others, never the time left. Lines for a log go to `stream` where it is given, else to the logger.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: Unit,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        log_seconds: float = LOG_SECONDS,
    ) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = self._first_done = done  # what an earlier start did says nothing about this one's rate
        self._words: tuple[str, ...] = ()
        self._to_logger, self._log_seconds = stream is None, log_seconds
        self._console = SafeStream(sys.stderr if stream is None else stream)
        self._is_terminal = self._console.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._started = self._shown = time.monotonic()
        self._open = False

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)

    def start(self) -> None:
        """Draw the empty bar, and take the terminal over from other lines (`print_line`)."""
        self._open = True
        if self._is_terminal:
            _ACTIVE.append(self)
            if self._total:
                self._draw()

    def advance(self, count: int) -> None:
        with self._lock:
            self.update(self._done + count, words=self._words)

    def update(self, done: int, total: int | None = None, words: tuple[str, ...] = ()) -> None:
        """Set what is done, and how much there is if that is now known better; show it when it is time to."""
        with self._lock:
            self._done, self._words = done, words
            self._total = self._total if total is None else total
            now = time.monotonic()
            if now - self._shown < (DRAW_SECONDS if self._is_terminal else self._log_seconds):
                return
            self._shown = now
            self._draw() if self._is_terminal else self._write_line(self.describe())

    def line(self, text: str) -> None:
        """Print a line of its own, above the bar on a terminal."""
        with self._lock:
            if self._is_terminal and self._open:
                self._console.write(f"{CLEAR_LINE}{text}\n")
                self._draw()
            else:
                self._console.write(text + "\n")
                self._console.flush()

    def close(self, *, finished: bool = True) -> None:
        """Leave the last state on the screen, and in a log if the work is `finished`. Safe to call twice."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            if self._is_terminal:
                _ACTIVE.remove(self)
                self._draw()
                self._console.write("\n")
                self._console.flush()
            elif finished and self._log_seconds > 0:
                self._write_line(self.describe())

    def describe(self) -> str:
        """The state in words, e.g. `convert: 1.20 of 4.80 GB (25 %), 0.40 GB/s, 0:09 left`."""
        text = ": ".join(filter(None, (self._label, ", ".join(self._words), self._amounts())))
        return ", ".join(filter(None, (f"{text} ({self._percent()} %)", self._rate(), self._time_left())))

    def fit(self, columns: int) -> str:
        """The state in one line of at most `columns` characters. Words are left out for it, the time left is not."""
        for characters in (BAR_CHARACTERS, SHORT_BAR_CHARACTERS):
            whole = f"{self._picture(characters)} {self.describe()}"
            if len(whole) <= columns:
                return whole
        picture = f"{self._picture(SHORT_BAR_CHARACTERS)} " if columns >= COLUMNS_OF_A_BAR else ""
        end = ", ".join(filter(None, (f"{self._percent()} %", self._time_left())))
        room = columns - len(picture) - len(end)
        first, *others = self._words or (self._label, self._amounts(), self._rate())
        words = first[: max(room - 2, 0)]
        for word in filter(None, others):
            if len(words) + len(word) + 4 > room:
                break
            words += f", {word}"
        return f"{picture}{words}, {end}"[:columns] if words else end[:columns]

    def _amounts(self) -> str:
        if self._unit != "bytes":
            return f"{self._done:,} of {self._total:,} {self._unit}"
        scale, name = self._scale()
        return f"{self._done / scale:,.2f} of {self._total / scale:,.2f} {name}"

    def _rate(self) -> str:
        """Nothing while nothing is done."""
        rate = self._per_second()
        if rate <= 0:
            return ""
        if self._unit != "bytes":
            return f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        scale, name = self._scale()
        return f"{rate / scale:,.2f} {name}/s"

    def _time_left(self) -> str:
        rate = self._per_second()
        return f"{format_seconds((self._total - self._done) / rate)} left" if rate > 0 else ""

    def _per_second(self) -> float:
        return (self._done - self._first_done) / max(time.monotonic() - self._started, 1e-9)

    def _percent(self) -> int:
        return 100 * self._done // max(self._total, 1)

    def _scale(self) -> tuple[float, str]:
        return (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")

    def _picture(self, characters: int) -> str:
        share = min(max(self._done / max(self._total, 1), 0.0), 1.0)
        full = round(share * characters)
        return f"[{'#' * full}{'-' * (characters - full)}]"

    def _draw(self) -> None:
        self._console.write(CLEAR_LINE + self.fit(self._columns() - 1))
        self._console.flush()

    def _columns(self) -> int:
        """Width of the terminal that is drawn on: stdout, which the standard library asks, may be a file or another."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            if "COLUMNS" not in os.environ and (columns := os.get_terminal_size(self._console.fileno()).columns):
                return columns
        return shutil.get_terminal_size().columns

    def _write_line(self, text: str) -> None:
        if self._to_logger:
            log.info("%s", text)
        else:
            self.line(text)


_ACTIVE: list[ProgressBar] = []  # bars that are drawn on a terminal now; lines of others go above the last one


def format_seconds(seconds: float) -> str:
    """`0:09`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ConsoleHandler(logging.Handler):
    """Log records as lines of the console, above the progress bar where there is one.

    Goes to `stream`, by default to what is stderr at that time. Without a formatter, only INFO comes without its name.
    """

    def __init__(self, stream: TextIO | None = None, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._stream = None if stream is None else SafeStream(stream)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.formatter is None and record.levelno != logging.INFO:
            text = f"{record.levelname} {text}"
        if _ACTIVE:
            _ACTIVE[-1].line(text)
            return
        console = self._stream or SafeStream(sys.stderr)
        console.write(text + "\n")
        console.flush()


@contextlib.contextmanager
def guarded_output() -> Iterator[SafeStream]:
    """Replace stdout and stderr by streams that cannot fail the work, and yield the one of stdout.

    At the end a stream that failed is pointed at the null device: Python would otherwise try once more to write what
    is still buffered, and end with exit code 120.
    """
    streams = SafeStream(sys.stdout), SafeStream(sys.stderr)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams  # all that is asked of them is write and flush
    try:
        yield streams[0]
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if stream.failure is not None:
                _point_at_null_device(stream)


def print_summary(text: str) -> None:
    """Print the last words of a command whose result lies on disk: that they cannot be printed is a warning only."""
    stdout = sys.stdout if isinstance(sys.stdout, SafeStream) else SafeStream(sys.stdout)
    stdout.write(text + "\n")
    stdout.flush()
    if stdout.failure is not None and not stdout.may_fail:
        log.warning("the work is done; its summary could not be printed: %s", stdout.failure)
        stdout.may_fail = True


def _point_at_null_device(stream: SafeStream) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
