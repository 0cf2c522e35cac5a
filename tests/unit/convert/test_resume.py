"""kill -9 half-way: nothing under the final name, and the next start goes on and proves what it finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint_convert import convert as convert_module
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.resume import JOURNAL, PartialFolder
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import assert_same_weights, write_hf

# A conversion that waits before each tensor after the first ten, so that the kill always comes half-way.
SLOW = """
import sys, time
from pathlib import Path
from checkpoint_convert import stream
from checkpoint_convert import convert as convert_module
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
copy, done = stream.Copier.copy, []
def slow(self, source, *rest):
    done.append(source.name)
    if len(done) > 10:
        time.sleep(60)
    return copy(self, source, *rest)
stream.Copier.copy = slow
convert(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), Options(to="torch_dist", tp=2, workers=1))
"""


def killed_half_way(source: Path, target: Path) -> Path:
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)])
    journal = target.with_name(target.name + ".partial") / JOURNAL
    deadline = time.monotonic() + 60
    while not (journal.is_file() and len(journal.read_text().splitlines()) >= 11):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    return journal


def test_kill_and_resume(tmp_path: Path) -> None:
    source, target = write_hf(tmp_path / "hf"), tmp_path / "out"
    journal = killed_half_way(source, target)
    # a byte of a finished tensor goes bad, and the last journal line is cut off
    first = json.loads(journal.read_text().splitlines()[1])["name"]
    assert first == "model.embed_tokens.weight"
    distcp = journal.parent / "__0_0.distcp"
    data = bytearray(distcp.read_bytes())
    data[1500] ^= 0xFF
    distcp.write_bytes(bytes(data))
    with journal.open("a") as file:
        file.write('{"name": "model.no')
    options = Options(to="torch_dist", tp=2, workers=1, read_back=True)
    receipt = convert(open_checkpoint(source), target, options)
    assert receipt["resumed_tensors"] == 10 - 1
    assert len(receipt["tensors"]) == len(open_checkpoint(source).weights.tensors)
    convert(open_checkpoint(target), tmp_path / "back", Options(to="hf"))
    assert_same_weights(source, tmp_path / "back")


def _fail(*args: object) -> None:
    raise RuntimeError("stop here")


@pytest.mark.parametrize("change", ["options", "source", "nothing"])
def test_another_plan_starts_afresh(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_hf(tmp_path / "hf"), tmp_path / "out"
    options = Options(to="torch_dist", tp=2, workers=1)
    with monkeypatch.context() as failing, pytest.raises(RuntimeError):
        failing.setattr(convert_module, "_check_values", _fail)
        convert(open_checkpoint(source), target, options)
    if change == "source":
        os.utime(source / "model.safetensors")
    tp = 4 if change == "options" else 2
    receipt = convert(open_checkpoint(source), target, Options(to="torch_dist", tp=tp, workers=1))
    assert receipt["resumed_tensors"] == (len(receipt["tensors"]) if change == "nothing" else 0)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    with PartialFolder(tmp_path / "out", "plan"), pytest.raises(ConversionError, match="another process"):
        convert(open_checkpoint(source), tmp_path / "out", Options(to="hf"))
