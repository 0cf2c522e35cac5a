"""Runs with terms against forgetting, from config alone on real ranks: resume, no effect, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from megatron_cpt.commands.ewc_pilot import ewc_pilot
from megatron_cpt.commands.fisher import fisher
from megatron_cpt.commands.kl_targets import kl_targets
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runs.checkpoints import complete_checkpoints, read_best
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART
from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.status import read_status
from megatron_cpt.train import pilot
from tests.configs import tiny_run
from tests.rank_pool import RankPool
from tests.synthetic_data import EOD, random_documents, write_dataset

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
def ewc(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """forgetting.ewc with Fisher values that the command has estimated on one rank."""
    folder = tmp_path_factory.mktemp("fisher")
    config = write_config(inputs, folder, "run", parallel={"gpus_per_node": 1})
    arguments = [str(config), "--data", str(inputs / "general"), "--to", str(folder / "values"), "--samples", "8"]
    done = CliRunner().invoke(fisher, [*arguments, "--json"], standalone_mode=False)
    assert done.return_value == 0, done.exception
    assert json.loads(done.stdout)["tokens"] == 8 * 64
    assert not (folder / "values.work").exists() and not (folder / "values.partial").exists()
    return {"strength": 1000.0, "fisher": str(folder / "values")}


@pytest.fixture(scope="module")
def whole(pool: RankPool, inputs: Path, ewc: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with KL on one of its two sources and EWC that nothing disturbed."""
    folder = tmp_path_factory.mktemp("forgetting")
    config, log = write_config(inputs, folder, "whole", {"kl": KL, "ewc": ewc}), folder / "whole.log"
    assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    return folder / "whole"


def killed_after(pool: RankPool, config: Path, run: Path, iteration: int, ranks: int, log: Path) -> None:
    """Start the run, and kill -9 its ranks as soon as it shows the iteration."""
    started = pool.start(config, ranks=ranks, log=log)
    while not (run / "metrics.jsonl").is_file() or max(rows(run), default=0) < iteration:
        assert not pool.have_ended(), log.read_text()[-3000:]
        time.sleep(0.005)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert pool.wait() == [-signal.SIGKILL] * ranks


def test_a_run_with_kl_and_a_penalty_killed_continues_bit_by_bit(
    pool: RankPool, inputs: Path, ewc: dict[str, Any], tmp_path: Path, whole: Path
) -> None:
    config, log = write_config(inputs, tmp_path, "cut", {"kl": KL, "ewc": ewc}), tmp_path / "log"
    killed_after(pool, config, tmp_path / "cut", 3, 2, log)
    assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert rows(tmp_path / "cut") == rows(whole)
    terms = [terms for _, _, terms in rows(whole).values()]
    assert len(terms) == STEPS and terms[-1]["kl"] > 1e-4
    assert terms[0]["ewc"] == 0.0 < terms[-1]["ewc"]  # of the distance from the base, not from the last start


def test_weight_0_and_strength_0_are_the_run_without_terms(
    pool: RankPool, inputs: Path, ewc: dict[str, Any], tmp_path: Path, whole: Path
) -> None:
    plain, weightless = (
        write_config(inputs, tmp_path, name, forgetting)
        for name, forgetting in (
            ("plain", None),
            ("weightless", {"kl": KL | {"weight": 0.0}, "ewc": ewc | {"strength": 0.0}}),
        )
    )
    for config in (plain, weightless):
        assert pool.run(config, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert rows(tmp_path / "weightless") == rows(tmp_path / "plain")
    assert rows(whole)[STEPS][:2] != rows(tmp_path / "plain")[STEPS][:2]  # negative control: the term does something


def test_a_huge_strength_keeps_the_weights_where_they_were(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    distances = {}
    for name, strength in (("held", 1e9), ("free", 1e-9)):
        config, log = write_config(inputs, tmp_path, name, {"ewc": {"strength": strength}}), tmp_path / "log"
        assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
        distances[name] = [2 * terms["ewc"] / strength for _, _, terms in rows(tmp_path / name).values()]  # squares
    held, free = distances["held"], distances["free"]
    assert max(held) <= 1.01 * held[1]  # Adam's first step goes as far as the rate; from there on it is held
    assert free[-1] > 10 * held[-1]


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


def gated(inputs: Path, folder: Path, run: str, **gate: Any) -> Path:
    """A run on ascending numbers that forgets descending ones."""
    downward = folder / "downward"
    if not downward.with_name("downward.bin").exists():
        write_dataset(downward, [np.append(ids[-2::-1], EOD) for ids in random_documents(20, 128, 5)])
    return write_config(
        inputs,
        folder,
        run,
        {"gate": {"general": ["downward"], "max_general_perplexity_increase": "3 %", **gate}},
        data={
            "train": [{"name": "domain", "prefix": str(inputs / "domain")}],
            "validation": {"downward": str(downward), "held_out": str(inputs / "held_out")},
            "cache_dir": str(folder / "index_cache"),
            "max_epochs": 9,
        },
        budget={"train_tokens": 512 * 12, "warmup_tokens": 0},
        optimizer={"lr": 4e-3},
        parallel={"gpus_per_node": 1},
        eval={"every": "2 iters"},
        checkpoint={"save_every": "3 iters", "best_by": {"downward": 1, "held_out": 0.5}},
    )


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == name]


def test_a_gate_that_warns_changes_nothing_and_says_how_much_was_forgotten(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    config = gated(inputs, tmp_path, "warned")
    assert pool.run(config, ranks=1, log=tmp_path / "log") == [0], (tmp_path / "log").read_text()[-3000:]
    assert pool.run(config, f"run_dir={tmp_path}/free", "forgetting.gate=null", ranks=1, log=tmp_path / "log") == [0]
    assert rows(tmp_path / "warned") == rows(tmp_path / "free")
    judged = events(tmp_path / "warned", "gate")
    assert [row["iteration"] for row in judged] == [0, 2, 4, 6, 8, 10, 12]
    losses = [row["loss"] for row in events(tmp_path / "warned", "validation") if row["name"] == "downward"]
    rises = [row["perplexity_increases"]["downward"] for row in judged]
    assert rises == pytest.approx([math.exp(loss - losses[0]) - 1 for loss in losses])
    assert [row["within"] for row in judged] == [rise <= 0.03 for rise in rises]
    assert rises[-1] > 0.03  # the rows above and below depend on it
    status = read_status(tmp_path / "warned").gate
    assert status is not None and status["perplexity_increases"] == {"downward": rises[-1]} and not status["within"]


def test_a_gate_that_stops_saves_and_does_not_restart(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    config = gated(inputs, tmp_path, "run", action="stop")
    assert pool.run(config, ranks=1, log=tmp_path / "log") == [DO_NOT_RESTART]
    last = events(tmp_path / "run", "gate")[-1]
    assert not last["within"]
    assert events(tmp_path / "run", "diverged")[0]["iteration"] == last["iteration"] < 12
    path, marker = complete_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert marker.iteration == last["iteration"]
    best = read_best(path.parent)
    assert best is None or best["iteration"] < last["iteration"]
    assert read_status(tmp_path / "run").state == "diverged"


def test_a_gate_that_rolls_back_goes_on_from_the_best_at_a_lower_rate_and_resumes_alike(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    options = {"action": "roll_back", "max_general_perplexity_increase": "4 %", "rate_factor": 0.25}
    config, log = gated(inputs, tmp_path, "run", **options), tmp_path / "log"
    assert pool.run(config, ranks=1, log=log) == [0], log.read_text()[-3000:]
    run = tmp_path / "run"
    judged = {row["iteration"]: row for row in events(run, "gate")}
    back = events(run, "rolled_back")
    assert back and not judged[back[0]["iteration"]]["within"]
    at, to = back[0]["iteration"], back[0]["checkpoint_iteration"]
    assert judged[to]["within"] and to < at
    rates = {row["iteration"]: row["lr"] for row in read_metrics(run / "metrics.jsonl") if "event" not in row}
    assert (rates[at], rates[at + 1]) == (4e-3, 1e-3)
    assert rows(run)[12]  # the data went on to the end of the budget
    # killed behind the return and started again, it decides and trains as the whole run did
    cut = gated(inputs, tmp_path, "cut", **options)
    killed_after(pool, cut, tmp_path / "cut", at + 1, 1, log)
    assert pool.run(cut, ranks=1, log=log) == [0], log.read_text()[-3000:]
    assert rows(tmp_path / "cut") == rows(run)
    memory = complete_checkpoints(tmp_path / "cut" / "checkpoints")[0][1].memory["gate"]
    assert memory["rate_factor"] == 0.25 ** memory["rollbacks"] < 1


def test_a_gate_that_has_nowhere_to_go_back_to_stops(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    config = gated(inputs, tmp_path, "run", action="roll_back", max_general_perplexity_increase=0.0)
    assert pool.run(config, ranks=1, log=tmp_path / "log") == [DO_NOT_RESTART], (tmp_path / "log").read_text()[-3000:]
    (stopped,) = events(tmp_path / "run", "diverged")
    assert "no checkpoint within the limit" in stopped["reason"] or "gone back" in stopped["reason"]


def test_adapters_are_held_near_the_base_without_them(pool: RankPool, inputs: Path, tmp_path: Path) -> None:
    config = write_config(inputs, tmp_path, "run", {"kl": {"weight": 1.0}}, lora={"rank": 4})
    assert pool.run(config, "model.dropout=0", ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[
        -3000:
    ]
    terms = [terms["kl"] for _, _, terms in rows(tmp_path / "run").values()]
    assert abs(terms[0]) < 1e-6 < terms[-1]  # the adapters add nothing at first


def test_the_pilot_measures_strengths_once_and_proposes_one(
    pool: RankPool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def in_pool(config: RunConfig, **_: Any) -> int:
        started.append(Path(config.folder).name)
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return pool.run(path, ranks=1, log=tmp_path / "log")[0]

    monkeypatch.setattr(pilot, "run_training", in_pool)
    config = gated(inputs, tmp_path, "run", max_general_perplexity_increase=0.0, action="stop")
    arguments = [str(config), "forgetting.ewc.strength=1", "forgetting.ewc.fisher=ones", "--points", "1", "--json"]
    arguments += ["--from", "0.3", "--keep", "0.1", "--tokens", "5000"]

    def propose() -> Any:
        done = CliRunner().invoke(ewc_pilot, arguments, standalone_mode=False)
        assert done.exception is None, (done.exception, (tmp_path / "log").read_text()[-3000:])
        return json.loads(done.stdout)

    found = propose()
    assert started == ["strength_0", "strength_0.3"]
    plain, held = found["outcomes"]
    assert 0 < held["domain_gain"] < plain["domain_gain"] and held["general_rise"] < plain["general_rise"]
    assert found["strength"] == 0.3
    assert not list(tmp_path.glob("run.ewc-pilot/*/checkpoints"))  # what was measured needs no room
    assert propose() == found and len(started) == 2
    arguments[-1] = "2000"  # another length: another pilot
    propose()
    assert len(started) == 4


def test_stored_targets_train_as_the_base_beside_the_model_and_a_killed_store_goes_on(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    for path in inputs.glob("general.*"):
        shutil.copy(path, tmp_path)  # the targets are written beside it
    train = [
        {"name": "domain", "prefix": str(inputs / "domain")},
        {"name": "general", "prefix": str(tmp_path / "general")},
    ]
    data = {"train": train, "cache_dir": str(tmp_path / "index_cache"), "max_epochs": 9}
    layouts = {"beside": {"gpus_per_node": 1}, "stored": {"gpus_per_node": 2, "tp": 2, "sequence_parallel": False}}
    for run, layout in layouts.items():
        kl = KL | ({"offline_top_k": 128} if run == "stored" else {})
        config = write_config(
            inputs,
            tmp_path,
            run,
            {"kl": kl},
            data=data,
            parallel=layout,
            model={"init_from": str(inputs / "model"), "check_start": False},
        )

    def store() -> list[bytes]:
        arguments = [str(config), "parallel.gpus_per_node=1", "parallel.tp=1"]
        done = CliRunner().invoke(kl_targets, arguments, standalone_mode=False)
        assert done.return_value == 0, done.exception
        return [(tmp_path / f"general.kl.{ending}").read_bytes() for ending in ("ids", "logq", "json")]

    whole = store()
    record = json.loads(whole[2])
    assert record["tokens"] > 1024 and not (tmp_path / "domain.kl.json").exists()
    (tmp_path / "general.kl.json").write_text(json.dumps(record | {"tokens": 512}))  # as a kill leaves it
    for ending, bytes_per_token in (("ids", 4 * 128), ("logq", 2 * 129)):
        with (tmp_path / f"general.kl.{ending}").open("r+b") as file:
            file.seek(512 * bytes_per_token)
            file.write(bytes(64 * bytes_per_token))
    assert store() == whole

    for run, layout in layouts.items():
        ranks, log = layout["gpus_per_node"], tmp_path / "log"
        assert pool.run(tmp_path / f"{run}.yaml", ranks=int(ranks), log=log) == [0] * int(ranks), log.read_text()[
            -3000:
        ]
    stored, beside = (rows(tmp_path / run) for run in ("stored", "beside"))
    for step, (loss, norm, terms) in stored.items():  # the targets are rounded to float16
        assert (loss, norm) == (pytest.approx(beside[step][0], abs=1e-4), pytest.approx(beside[step][1], rel=1e-3))
        assert terms["kl"] == pytest.approx(beside[step][2]["kl"], rel=1e-3, abs=2e-5)
    assert stored[STEPS][2]["kl"] > 1e-3
