from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.folder import (
    Change,
    RunFolder,
    changes_since_last_attempt,
    config_changes,
    create_run_folder,
    record_attempt,
    refused_changes,
    resolved_dict,
)


def make(folder: Path, **changes: Any) -> RunConfig:
    raw = {"job_name": "t", "run_dir": str(folder / "run"), "model": {"init_from": "m"}}
    return build_config(raw | changes)


def prepare(config: RunConfig, model_dir: Path) -> tuple[RunFolder, list[Change]]:
    folder = RunFolder(Path(config.folder))
    changes = changes_since_last_attempt(folder, config)
    create_run_folder(folder, config, model_dir)
    return folder, changes


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "model.safetensors", "pytorch_model.bin"):
        (folder / name).write_text(name)
    return folder


def test_side_files_travel_and_weights_do_not(tmp_path: Path, model_dir: Path) -> None:
    folder, changes = prepare(make(tmp_path), model_dir)
    assert changes == []
    assert {p.name for p in folder.hf.iterdir()} == {"config.json", "tokenizer.json", "merges.txt"}
    assert prepare(make(tmp_path), folder.hf)[1] == []  # from its own copy: nothing is lost
    assert len(list(folder.hf.iterdir())) == 3


def test_a_new_budget_batch_layout_or_rate_continues_the_run(tmp_path: Path, model_dir: Path) -> None:
    prepare(make(tmp_path), model_dir)
    legal = make(
        tmp_path,
        budget={"train_tokens": "10M"},
        batch={"global_batch_size": 64},
        optimizer={"lr": 1e-4},
        parallel={"gpus_per_node": 4, "tp": 2},
        eval={"every": "1M tokens"},
        data={"train": [{"name": "a", "prefix": "a"}]},
    )
    folder, changes = prepare(legal, model_dir)
    shown = [str(change) for change in changes]
    assert "budget.train_tokens: 1638400 -> 10000000" in shown
    assert "optimizer.lr: 5e-05 -> 0.0001" in shown
    assert len(shown) == 7
    assert record_attempt(folder, changes) == 1
    assert record_attempt(folder, []) == 2
    entries = [json.loads(line) for line in folder.history.read_text().splitlines()]
    assert entries[0]["changes"][0]["path"] == changes[0].path


@pytest.mark.parametrize(
    ("change", "path"),
    [({"seed": 9}, "seed"), ({"job_name": "u"}, "job_name"), ({"precision": {"dtype": "fp32"}}, "precision.dtype")],
)
def test_seed_name_and_precision_make_it_another_run(
    tmp_path: Path, model_dir: Path, change: dict[str, Any], path: str
) -> None:
    prepare(make(tmp_path), model_dir)
    _, changes = prepare(make(tmp_path, optimizer={"lr": 1e-4}, **change), model_dir)
    assert [c.path for c in refused_changes(changes)] == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write the run folder"):
        prepare(make(tmp_path), model_dir)


def test_a_resolved_config_reads_back(tmp_path: Path, model_dir: Path) -> None:
    config = make(tmp_path, checkpoint={"save_every": "1.5M tokens"})
    assert build_config(resolved_dict(config)) == config
    assert config_changes(resolved_dict(config), resolved_dict(config)) == []
