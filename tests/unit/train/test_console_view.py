"""The run's view on a console: lines in a log, and a console that fails changes nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.train import console_view
from megatron_cpt.train.console_view import ConsoleView

ROW: dict[str, Any] = {
    "iteration": 5,
    "loss": 2.5,
    "lr": 1e-4,
    "grad_norm": 1.0,
    "tokens_per_second": 1000.0,
    "consumed_tokens": 500,
    "eta_seconds": 75.0,
}


def test_steps_and_long_validations_are_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(console_view.time, "monotonic", lambda: now[0])
    view = ConsoleView(stream, 1000, 0)
    view.step(ROW, 10, 1000)
    for done in range(4):
        view.validation("held_out", done, 4)
        now[0] += 6.0
    view.line("finished")
    view.close()
    assert stream.getvalue().splitlines() == [
        "iter 5/10  loss 2.5000  lr 0.0001  grad 1  1,000 tok/s  500/1,000 tokens  left 1:15",
        "validating held_out: 2/4 micro-batches",
        "finished",
    ]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    view = ConsoleView(stream, 1000, 0)
    view.step(ROW, 10, 1000)
    view.line("a line")
    view.close()
    assert (
        "[#####-----] iter 5/10, loss 2.5000, 1,000 tok/s, lr 0.0001" in stream.getvalue()
        and "a line\n" in stream.getvalue()
    )


@pytest.mark.parametrize("kind", ["full", "closed", "none"])
def test_a_console_that_fails_is_switched_off(kind: str, tmp_path: Path) -> None:
    file = (tmp_path / "closed").open("w")
    file.close()
    stream = {"full": open("/dev/full", "w"), "closed": file, "none": None}[kind]  # noqa: SIM115 - it outlives the view
    view = ConsoleView(stream, 1000, 0)
    for _ in range(3):
        view.step(ROW, 10, 1000)
        view.validation("held_out", 0, 4)
    view.close()
