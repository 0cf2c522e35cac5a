"""Runs with terms against forgetting, from config alone on real ranks: resume, no effect, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.runs.metrics import read_metrics
from tests.configs import tiny_run
from tests.rank_pool import RankPool

STEPS = 8
KL = {"weight": 0.5, "direction": "reverse", "temperature": 2.0, "sources": ["general"]}


def write_config(
    inputs: Path, folder: Path, run: str, forgetting: dict[str, Any] | None = None, **changes: Any
) -> Path:
    train = [{"name": name, "prefix": str(inputs / name), "weight": 1} for name in ("domain", "general")]
    tree = tiny_run(
        inputs,
        run_dir=str(folder / run),
        model={"dropout": 0.1},
        budget={"train_tokens": 512 * STEPS},
        schedule={"kind": "constant"},
        optimizer={"lr": 2e-3},
        batch={"micro_batch_size": 1},
        parallel={"gpus_per_node": 2, "pp": 2},
        data={"train": train, "cache_dir": str(folder / "index_cache")},
        checkpoint={"save_every": "2 iters"},
        **({"forgetting": forgetting} if forgetting is not None else {}),
    )
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def rows(run: Path) -> dict[int, tuple[Any, ...]]:
    """iteration -> (loss, gradient norm, loss terms)."""
    found = [row for row in read_metrics(run / "metrics.jsonl") if "event" not in row]
    return {row["iteration"]: (row["loss"], row["grad_norm"], row.get("loss_terms")) for row in found}


@pytest.fixture(scope="module")
def whole(pool: RankPool, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with KL on one of its two sources that nothing disturbed."""
    folder = tmp_path_factory.mktemp("forgetting")
    config, log = write_config(inputs, folder, "whole", {"kl": KL}), folder / "whole.log"
    assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    return folder / "whole"


def test_a_run_with_kl_continues_bit_by_bit(pool: RankPool, inputs: Path, tmp_path: Path, whole: Path) -> None:
    config, log = write_config(inputs, tmp_path, "cut", {"kl": KL}), tmp_path / "log"
    assert pool.run(config, "budget.train_tokens=2048", ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert rows(tmp_path / "cut") == rows(whole)
    terms = [terms["kl"] for _, _, terms in rows(whole).values()]
    assert len(terms) == STEPS and terms[-1] > 1e-4


def test_weight_0_is_the_run_without_the_term(pool: RankPool, inputs: Path, tmp_path: Path, whole: Path) -> None:
    plain, weightless = (
        write_config(inputs, tmp_path, name, forgetting)
        for name, forgetting in (("plain", None), ("weightless", {"kl": KL | {"weight": 0.0}}))
    )
    for config in (plain, weightless):
        assert pool.run(config, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert rows(tmp_path / "weightless") == rows(tmp_path / "plain")
    assert rows(whole)[STEPS][:2] != rows(tmp_path / "plain")[STEPS][:2]  # negative control: the term does something


def test_a_base_that_is_gone_is_refused_before_anything_starts(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    changes = {"model": {"init_from": str(tmp_path / "model"), "check_start": False}}
    config = write_config(inputs, tmp_path, "run", {"kl": KL}, **changes)
    log = tmp_path / "log"
    assert pool.run(config, "budget.train_tokens=1024", ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    shutil.rmtree(tmp_path / "model")
    assert pool.run(config, ranks=2, log=log) == [2, 2]
    assert "forgetting.kl compares with the weights of model.init_from" in log.read_text()
    assert pool.run(config, "forgetting.kl=null", ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
