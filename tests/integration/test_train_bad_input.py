"""`megatron-cpt train` on what users get wrong: exit 2, one message, a hint, and nothing started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_cpt.cli import cli, run
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path
from tests.configs import tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def refuse(*_: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("megatron_cpt.train.api.run_ranks", refuse)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    return tiny_run(tmp_path)


def train(job: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(job))
    with pytest.raises(SystemExit) as caught:
        run(cli, ["train", str(path), *arguments])
    return int(caught.value.code or 0), capsys.readouterr().err


def cut_bin(folder: Path) -> None:
    path = bin_path(folder / "data")
    path.write_bytes(path.read_bytes()[:-2])


def damage_idx(folder: Path) -> None:
    path = idx_path(folder / "data")
    raw = bytearray(path.read_bytes())
    raw[9:17] = b"\x07" * 8
    path.write_bytes(raw)


def idx_points_elsewhere(folder: Path) -> None:
    path = idx_path(folder / "data")
    raw = bytearray(path.read_bytes())
    pointer = 34 + 4 * 60 + 8 * 5  # the header, 60 lengths, five pointers
    raw[pointer : pointer + 8] = (10**9).to_bytes(8, "little")
    path.write_bytes(raw)


def ids_beyond_the_vocabulary(folder: Path) -> None:
    tokens = np.fromfile(bin_path(folder / "data"), np.uint16)
    tokens[0] = 4000
    tokens.tofile(bin_path(folder / "data"))


def another_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')


def larger_vocabulary(folder: Path) -> None:
    write_dataset(folder / "data", random_documents(60, 128, 1), vocab_size=5000)


CASES = [
    (cut_bin, "its manifest says"),
    (damage_idx, "is not a Megatron index|is damaged|version"),
    (idx_points_elsewhere, "points to the wrong byte"),
    (ids_beyond_the_vocabulary, "outside the vocabulary"),
    (another_tokenizer, "is not the model's"),
    (larger_vocabulary, "the model only 128 rows"),
    (lambda folder: manifest_path(folder / "data").unlink(), "half-written, or written by another tool"),
    (lambda folder: (folder / "run").write_text("x"), "cannot write the run folder"),
    (lambda folder: (folder / "model" / "config.json").unlink(), "holds no config.json"),
]


@pytest.mark.parametrize(("damage", "message"), CASES)
def test_damaged_files(
    damage: Any, message: str, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path)
    code, err = train(job, tmp_path, capsys)
    assert code == 2, err

    assert re.search(message, err), err
    assert err.count("error:") == 1
    assert "hint:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=[]"], "nothing to train on"),
        (["data.validation={held: /nowhere/set}"], "no such dataset"),
        (["data.max_epochs=0.1"], "max_epochs allows 0.1"),
        (["batch.seq_length=512", "data.max_epochs=1e9", "data.train.0.prefix=/nowhere/x"], "no such dataset"),
        (["parallel.nodes=2", "batch.global_batch_size=8"], "one machine cannot start the others"),
        (["parallel.tp=3", "parallel.gpus_per_node=3"], "must divide the model's 4 attention heads"),
        (["optimiser.lr=1"], "did you mean"),
        (["budget.train_tokens=10"], "smaller than one step"),
        (["eval.tokens=0"], "eval.tokens"),
        (["optimizer.lr=0"], "hint: a number above 0"),
        (["checkpoint.keep_every=0"], "checkpoint.keep_every"),
        (["failure.step_timeout_minutes=.inf"], "failure.step_timeout_minutes"),
        ([f"seed={2**40}"], "seed"),
    ],
)
def test_bad_values(
    overrides: list[str], message: str, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = train(job, tmp_path, capsys, *overrides)
    assert code == 2, err
    assert message in err
    assert "hint:" in err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_run(job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "resolved.yaml").write_text(yaml.safe_dump({**job, "seed": 99}))
    code, err = train(job, tmp_path, capsys)
    assert code == 2
    assert "seed: 99 -> 1234" in err
    assert "--accept-changes" in err


def test_no_room_for_a_checkpoint(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_cpt.launch.preflight.free_bytes", lambda root: 1000)
    code, err = train(job, tmp_path, capsys)
    assert code == 2
    assert "1,000 are free" in err and "hint:" in err


def test_a_branch_point_that_is_none(job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = train(job, tmp_path, capsys, f"checkpoint.branch_from={tmp_path}")
    assert code == 2
    assert "neither a run folder nor one of its complete checkpoints" in err


def test_the_kill_switch_keeps_a_run_from_starting(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "KILL").touch()
    assert train(job, tmp_path, capsys)[0] == 76
