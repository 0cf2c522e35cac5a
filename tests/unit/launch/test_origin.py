"""What `model.init_from` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.launch.origin import model_dir, resolve_origin, side_files_dir
from megatron_cpt.runs.checkpoints import checkpoint_path, seal
from megatron_cpt.runs.marker import MARKER, Marker


def write_checkpoint(run: Path, iteration: int) -> Path:
    partial = run / "checkpoints" / f"iter_{iteration:07d}.partial-1"
    partial.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (partial / name).write_text("{}")
    marker = Marker(iteration, 100 * iteration, {}, {}, "fully_reshardable", 1, "", {})
    seal(partial, checkpoint_path(partial.parent, iteration), "", marker)
    return checkpoint_path(partial.parent, iteration)


def test_the_kinds_of_origin(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = write_checkpoint(run, 5), write_checkpoint(run, 10)
    assert resolve_origin("random").kind == "random"
    assert (resolve_origin(str(run)).kind, resolve_origin(str(run)).weights) == ("torch_dist", new)
    assert (resolve_origin(str(old)).kind, resolve_origin(str(old)).weights) == ("torch_dist", old)
    assert resolve_origin(str(tmp_path)).kind == "hf"
    assert resolve_origin(str(tmp_path / "nowhere")).kind == "missing"
    (new / MARKER).unlink()  # not complete: the one before it is meant
    assert resolve_origin(str(run)).weights == old
    (new / MARKER).write_text("{")
    with pytest.raises(CheckpointError, match="cannot use"):
        resolve_origin(str(run))


def test_a_run_with_a_checkpoint_has_its_own_side_files(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    for folder in (base, run / "hf"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    config = build_config({"job_name": "t", "run_dir": str(run), "model": {"init_from": str(base)}})
    assert model_dir(config) == base.resolve()
    write_checkpoint(run, 5)
    assert model_dir(config) == run / "hf"
    (base / "config.json").unlink()
    assert model_dir(config) == run / "hf"
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        side_files_dir(config.model)
