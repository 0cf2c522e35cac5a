"""`megatron-cpt dry-run`: its page and JSON, what it reads of files that are here, and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.cli import cli, run
from megatron_cpt.dry_run import every_rank
from megatron_cpt.dry_run.rank import BuiltRank, note_rank
from megatron_cpt.launch import preflight
from megatron_cpt.presets import presets
from tests.configs import write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import VOCAB, write_model

REPO = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).with_name("golden")
EXAMPLE = "examples/qwen2_72b/config.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it; so it is put back


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        run(cli, ["dry-run", *map(str, arguments)])
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err


def test_the_72b_example_fits_together_on_its_32_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPT_UPDATE_GOLDEN=1 writes the page again, to be read before it is committed."""
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 10**15)  # not of this machine
    code, page, _ = dry_run(capsys, EXAMPLE)
    assert code == 0
    path = GOLDEN / "qwen2_72b.txt"
    if os.environ.get("CPT_UPDATE_GOLDEN"):
        path.write_text(page)
    assert page == path.read_text()
    assert "72,706,203,648 over all ranks, as config.json says" in page


@pytest.mark.parametrize(
    ("preset", "gpus"),
    [("llama-3.2-3b", 1), ("qwen2.5-7b", 8), *(pytest.param(name, 32, marks=pytest.mark.slow) for name in presets())],
)
def test_a_preset_runs_as_init_writes_it(
    preset: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(cli, ["init", "--preset", preset, "--gpus", str(gpus), "--to", str(tmp_path)])
    capsys.readouterr()
    code, out, _ = dry_run(capsys, tmp_path / "config.yaml", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["ranks"], found["faults"]) == (0, True, gpus, [])
    assert found["parameters"] == found["expected_parameters"] == presets()[preset].architecture.num_parameters
    assert found["max_rank_bytes"] == max(stage["total_bytes"] for stage in found["stages"])
    for stage in found["stages"]:
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "transient")
        assert stage["total_bytes"] == sum(stage[f"{part}_bytes"] for part in parts)
    assert any("not on this machine" in note for note in found["notes"])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A config whose weights and data are on this machine."""
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(40, VOCAB, seed=0), VOCAB)
    return write_tiny_run(tmp_path, parallel={"gpus_per_node": 2, "tp": 2})


def test_headers_of_weights_and_data_that_are_here_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, page, err = dry_run(capsys, here, "--strict")
    assert code == 0, err
    assert "weights: the headers of 51 tensors" in page and "are those of config.json" in page
    assert "data: the .bin of 'data' is as its .idx says" in page
    assert "not on this machine" not in page


def test_what_is_absent_is_a_note_and_with_strict_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here.parent / "model" / "model.safetensors").unlink()
    for ending in (".bin", ".idx", ".manifest.json"):
        (here.parent / f"data{ending}").unlink()
    config = yaml.safe_load(here.read_text())
    config["model"] |= {"init_from": str(here.parent / "elsewhere"), "architecture": str(here.parent / "model")}
    here.write_text(yaml.safe_dump(config))
    code, page, _ = dry_run(capsys, here)
    assert code == 0 and page.count("note: not on this machine") == 2 and "weights:" not in page
    code, page, err = dry_run(capsys, here, "--strict")
    assert (code, page) == (2, "")
    assert "elsewhere" in err and "no such dataset" in err and "hint:" in err


def damage_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_index(folder: Path) -> None:
    path = folder / "data.bin"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(("damage", "what"), [(damage_weights, "model.safetensors"), (damage_index, "data")])
def test_a_damaged_file_is_exit_2_before_anything_is_built(
    damage: Any, what: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(here.parent)
    monkeypatch.setattr(every_rank, "build_rank", None)
    code, page, err = dry_run(capsys, here)
    assert (code, page) == (2, "") and what in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "what"),
    [("parallel.tp=3", "64 attention heads"), ("parallel.pp=7", "80 layers"), ("parallel.tpp=2", "parallel.tp")],
)
def test_a_config_that_cannot_run_is_exit_2(override: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, page, err = dry_run(capsys, EXAMPLE, override)
    assert (code, page) == (2, "") and what in err and "hint:" in err


def test_a_fault_is_exit_1_and_stands_on_the_page(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(*arguments: Any) -> BuiltRank:
        noted = note_rank(*arguments)
        return replace(noted, saved=noted.saved[1:]) if noted.place.rank == 1 else noted

    monkeypatch.setattr(every_rank, "note_rank", forget)
    code, page, _ = dry_run(capsys, here)
    assert (
        code == 1 and "fault: " in page and "1 fault, listed below" in page and "everything fits together" not in page
    )
    code, page, _ = dry_run(capsys, here, "--json")
    found = json.loads(page)
    assert (code, found["ok"]) == (1, False) and [fault["check"] for fault in found["faults"]] == ["checkpoint"]
