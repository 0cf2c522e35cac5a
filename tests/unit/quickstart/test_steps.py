"""The step runner: what is finished is skipped, what changed runs again with all that follows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from steps import Step, run_steps

from megatron_cpt.errors import CptError

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
FAIL_ONCE = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
again = path.exists()
path.write_text("half" + " whole" * again)
sys.exit(not again)
"""


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def _append(path: Path, text: str, title: str, inputs: list[Path] | None = None) -> Step:
    return Step(title, [sys.executable, "-c", APPEND, str(path), text], [path], inputs or [])


def test_second_run_skips_everything(tmp_path: Path, console: Console) -> None:
    steps = [_append(tmp_path / "a", "1", "first"), _append(tmp_path / "b", "2", "second")]
    for _ in range(2):
        state = run_steps(steps, tmp_path / "steps.json", console)
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("1", "2")
    assert console.export_text().count("skipped") == 2
    assert all(record["finished"] and record["peak_memory_bytes"] >= 0 for record in state.values())


def test_a_changed_input_repeats_its_step_and_all_after_it_from_nothing(tmp_path: Path, console: Console) -> None:
    config = tmp_path / "config"
    steps = [
        _append(tmp_path / "a", "1", "first"),
        _append(tmp_path / "b", "2", "second", [config]),
        _append(tmp_path / "c", "3", "third"),
    ]
    for content in ("old", "new"):
        config.write_text(content)
        run_steps(steps, tmp_path / "steps.json", console)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["1", "2", "3"]  # not 22 and 33: begun anew
    assert console.export_text().count("skipped") == 1


def test_a_lost_output_is_made_again(tmp_path: Path, console: Console) -> None:
    step = _append(tmp_path / "a", "1", "first")
    run_steps([step], tmp_path / "steps.json", console)
    (tmp_path / "a").unlink()
    run_steps([step], tmp_path / "steps.json", console)
    assert (tmp_path / "a").read_text() == "1"


def test_a_failed_step_stops_the_rest_and_is_continued_as_it_is(tmp_path: Path, console: Console) -> None:
    steps = [
        Step("fails once", [sys.executable, "-c", FAIL_ONCE, str(tmp_path / "a")], [tmp_path / "a"]),
        _append(tmp_path / "b", "2", "second"),
    ]
    with pytest.raises(CptError, match="'fails once' failed with exit code 1"):
        run_steps(steps, tmp_path / "steps.json", console)
    assert not (tmp_path / "b").exists()
    run_steps(steps, tmp_path / "steps.json", console)
    assert (tmp_path / "a").read_text() == "half whole"  # its half result was kept for it to continue
    assert (tmp_path / "b").read_text() == "2"


def test_standard_output_is_kept_whole_or_not_at_all(tmp_path: Path, console: Console) -> None:
    result = tmp_path / "out.json"
    bad = Step("bad", [sys.executable, "-c", "print('{'); raise SystemExit(3)"], [], [], result)
    with pytest.raises(CptError):
        run_steps([bad], tmp_path / "steps.json", console)
    assert not result.exists()
    good = Step("good", [sys.executable, "-c", "print('{}')"], [], [], result)
    run_steps([good], tmp_path / "steps.json", console)
    assert json.loads(result.read_text()) == {}


def test_memory_of_child_processes_counts(tmp_path: Path, console: Console) -> None:
    hold = "x = bytearray(120_000_000); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(2)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    state = run_steps([Step("child", [sys.executable, "-c", child], [])], tmp_path / "steps.json", console)
    assert state["child"]["peak_memory_bytes"] > 110_000_000
