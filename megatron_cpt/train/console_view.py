"""What the user's terminal shows of a run: a progress bar there, one line per logged step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from megatron_cpt.console import LOG_SECONDS, ProgressBar, SafeStream, format_seconds
from megatron_cpt.launch.local import CONSOLE_FD


def open_console() -> TextIO | None:
    """The user's terminal: handed down by the process that started the ranks, else this process's stderr."""
    descriptor = os.environ.get(CONSOLE_FD)
    if descriptor is None:
        return sys.stderr
    try:
        return os.fdopen(int(descriptor), "w", closefd=False)
    except (OSError, ValueError):
        return None


class ConsoleView:
    """Steps, validations and events as a person wants to see them; a console that fails changes nothing else."""

    def __init__(self, stream: TextIO | None, train_tokens: int, consumed_tokens: int) -> None:
        self._stream = SafeStream(stream)
        self._consumed_tokens = consumed_tokens
        self._said = time.monotonic()
        self._bar: ProgressBar | None = None
        if self._stream.isatty():
            self._bar = ProgressBar("train", train_tokens, "tokens", done=consumed_tokens, stream=stream)
            self._bar.start()

    def step(self, row: dict[str, Any], train_iters: int, train_tokens: int) -> None:
        step, loss = f"iter {row['iteration']}/{train_iters}", f"loss {row['loss']:.4f}"
        rates = f"lr {row['lr']:.3g}", f"grad {row['grad_norm']:.3g}"
        speed = f"{row['tokens_per_second']:,.0f} tok/s"
        consumed = self._consumed_tokens = row["consumed_tokens"]
        if self._bar is not None:
            self._bar.update(consumed, words=(step, loss, speed, *rates))
        else:
            left = format_seconds(row["eta_seconds"])
            self.line("  ".join((step, loss, *rates, speed, f"{consumed:,}/{train_tokens:,} tokens", f"left {left}")))

    def validation(self, name: str, done: int, total: int) -> None:
        """Show how far a validation is: in the bar, and elsewhere by a line when one takes long."""
        now, text = time.monotonic(), f"validating {name}: {done}/{total} micro-batches"
        if done == 0:
            self._said = now
        if self._bar is not None:
            self._bar.update(self._consumed_tokens, words=(text,))
        elif now - self._said >= LOG_SECONDS:
            self._said = now
            self.line(text)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.line(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
