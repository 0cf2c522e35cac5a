"""A run of adapters: kill -9 and another layout, checkpoints without the base, and what is no continuation of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import yaml

from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.launch.origin import resolve_origin
from megatron_cpt.runs.checkpoints import complete_checkpoints
from tests.integration.conftest import linked
from tests.integration.test_train_resume import STEPS, rows, write_config
from tests.rank_pool import RankPool

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def work(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(inputs, tmp_path_factory.mktemp("lora"))


def lora_config(work: Path, run: str, layout: dict[str, int], **lora: Any) -> Path:
    checkpoint = {"save_every": "3 iters", "keep_last": 9}
    return write_config(work, run, layout, lora=LORA | lora, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def whole(pool: RankPool, work: Path) -> Path:
    config = lora_config(work, "whole", {"tp": 2})
    assert pool.run(config, ranks=2, log=work / "whole.log") == [0, 0], (work / "whole.log").read_text()[-3000:]
    return work / "whole"


def test_a_killed_run_continues_bit_by_bit(pool: RankPool, work: Path, whole: Path) -> None:
    config = lora_config(work, "killed", {"tp": 2})
    pids = pool.start(config, ranks=2, log=work / "killed.log")
    while not complete_checkpoints(work / "killed" / "checkpoints"):
        assert not pool.have_ended(), (work / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pool.wait() == [-9, -9]
    assert pool.run(config, ranks=2, log=work / "again.log") == [0, 0], (work / "again.log").read_text()[-3000:]
    assert rows(work / "killed") == rows(whole)


def test_a_checkpoint_holds_adapters_alone(whole: Path) -> None:
    checkpoint = complete_checkpoints(whole / "checkpoints")[0][0]
    keys = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {key for key in keys if key.startswith("decoder.") and "_extra_state" not in key}
    states = {key for key in keys if key.startswith("optimizer.state.")}
    assert len(weights) == 7 * 2 and all(".lora." in key for key in weights)
    assert states == {f"optimizer.state.{s}.{key}" for key in weights for s in ("exp_avg", "exp_avg_sq", "param")}
    assert not any("embedding" in key or "output_layer" in key for key in keys)


def test_it_continues_under_another_layout(pool: RankPool, work: Path, whole: Path) -> None:
    config = lora_config(work, "without_dropout", {"tp": 2}, dropout=0.0)
    assert pool.run(config, ranks=2, log=work / "a.log") == [0, 0]
    run, moved = work / "without_dropout", work / "moved"
    shutil.copytree(run, moved)
    for path, _ in complete_checkpoints(moved / "checkpoints"):
        if int(path.name.removeprefix("iter_")) > STEPS - 4:
            shutil.rmtree(path)
    assert complete_checkpoints(moved / "checkpoints")
    assert pool.run(lora_config(work, "moved", {"pp": 2}, dropout=0.0), ranks=2, log=work / "b.log") == [0, 0]
    ours, theirs = rows(moved), rows(run)
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert ours[key] == pytest.approx(row, rel=2e-5), key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 8}, "lora.rank: 4 -> 8"),
        ({"alpha": 16.0}, "lora.alpha: 8.0 -> 16.0"),
        ({"targets": ["q_proj"]}, "lora.targets"),
        ({"rslora": True}, "lora.rslora: false -> true"),
    ],
)
@pytest.mark.parametrize("accepted", [[], ["--accept-changes"]])
def test_other_adapters_are_no_continuation(
    pool: RankPool, work: Path, whole: Path, change: dict[str, Any], said: str, accepted: list[str]
) -> None:
    config = lora_config(work, "whole", {"tp": 2}, **change)
    log = work / "refused.log"
    assert pool.run(config, *accepted, ranks=2, log=log) != [0, 0]
    assert said in log.read_text() and "Traceback" not in log.read_text()


def test_another_base_is_no_continuation(pool: RankPool, work: Path, whole: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = work / "other_model"
    shutil.copytree(work / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    config = lora_config(work, "whole", {"tp": 2})
    tree = yaml.safe_load(config.read_text())
    tree["model"]["init_from"] = str(other)
    config.write_text(yaml.safe_dump(tree))
    log = work / "other.log"
    assert pool.run(config, "--accept-changes", ranks=2, log=log) != [0, 0]
    assert "weights (sha256)" in log.read_text()


def test_adapters_are_no_model(whole: Path) -> None:
    from checkpoint_convert.open import open_checkpoint

    with pytest.raises(CheckpointError, match="holds adapters of rank 4 alone"):
        resolve_origin(str(whole))
    with pytest.raises(CptError, match="holds adapters of rank 4 alone"):
        open_checkpoint(whole)
