"""Runs whose shares change, from config alone on real ranks: what was given, resume, and no effect."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.metrics import read_metrics
from tests.configs import tiny_run
from tests.rank_pool import RankPool

STEPS = 8
STEP_TOKENS = 512
CURRICULUM = {"points": [{"tokens": 0, "domain": "50 %"}, {"tokens": STEPS * STEP_TOKENS, "domain": "100 %"}]}


PHASES = [
    {"name": "foundation", "train_tokens": 1024, "seq_length": 32, "data": {"shares": {"domain": 0.5, "general": 0.5}}},
    {"name": "evolution", "train_tokens": 1100, "rate": {"course": "rewarm", "lr": 2e-3, "warmup_tokens": 256}},
    {"name": "mastery", "train_tokens": 948, "data": {"replay_ratio": 0}, "rate": {"course": "anneal", "min_lr": 0}},
]


def write_config(
    inputs: Path,
    folder: Path,
    run: str,
    parallel: dict[str, Any] | None = None,
    phases: list[dict[str, Any]] | None = None,
    **data: Any,
) -> Path:
    train = [
        {"name": "domain", "prefix": str(inputs / "domain")},
        {"name": "general", "prefix": str(inputs / "general"), "role": "replay"},
    ]
    tree = tiny_run(
        inputs,
        run_dir=str(folder / run),
        budget={"train_tokens": STEP_TOKENS * STEPS},
        schedule={"kind": "constant"},
        batch={"micro_batch_size": 1},
        parallel={"gpus_per_node": 2, **(parallel or {"pp": 2})},
        data={"train": train, "cache_dir": str(folder / "index_cache")} | data,
        checkpoint={"save_every": "2 iters"},
    )
    if phases is not None:
        del tree["budget"]["train_tokens"]
        tree |= {"phases": phases, "optimizer": {"lr": 1e-3}}
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "event" not in row]


def seen(run: Path, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("iteration", "loss", "grad_norm", *names)) for row in steps(run)]


def test_a_curriculum_gives_what_it_says_and_resumes_under_another_layout(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    whole = write_config(inputs, tmp_path, "whole", schedule=CURRICULUM)
    assert pool.run(whole, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    rows = steps(tmp_path / "whole")
    for row in rows:
        done = row["consumed_tokens"] / (STEPS * STEP_TOKENS)
        due = (0.5 * done + 0.25 * done**2) * STEPS * STEP_TOKENS  # the integral of the line
        assert abs(row["tokens_by_source"]["domain"] - due) < 64  # one sample
        assert abs(row["scheduled_share_by_source"]["domain"] - (0.5 + 0.5 * (done - 0.5 / STEPS))) < 1e-6
    assert rows[0]["share_by_source"]["general"] == 0.5 and rows[-1]["share_by_source"]["general"] <= 0.25
    cut = write_config(inputs, tmp_path, "cut", schedule=CURRICULUM)
    for layout, tokens in (({"pp": 2}, 1536), ({"tp": 2}, 3072), ({}, STEPS * STEP_TOKENS)):
        cut = write_config(inputs, tmp_path, "cut", layout, schedule=CURRICULUM)
        assert pool.run(cut, f"budget.train_tokens={tokens}", ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert [row["tokens_by_source"] for row in steps(tmp_path / "cut")] == [row["tokens_by_source"] for row in rows]
    assert all(abs(a[1] - b[1]) < 1e-5 for a, b in zip(seen(tmp_path / "cut"), seen(tmp_path / "whole"), strict=True))


def test_a_ratio_of_0_is_the_run_without_replay_and_another_ratio_on_the_way_keeps_the_positions(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    plain = write_config(inputs, tmp_path, "plain", train=[{"name": "domain", "prefix": str(inputs / "domain")}])
    none = write_config(inputs, tmp_path, "none", replay_ratio=0)
    half = write_config(inputs, tmp_path, "half", replay_ratio="50 %")
    for config in (plain, none, half):
        assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert seen(tmp_path / "none") == seen(tmp_path / "plain")
    assert seen(tmp_path / "half") != seen(tmp_path / "plain")  # negative control
    changed = ("data.replay_ratio=25 %", f"budget.train_tokens={2 * STEPS * STEP_TOKENS}")
    assert pool.run(half, *changed, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    ledger = complete_checkpoints(tmp_path / "half" / "checkpoints")[0][1].ledger
    whole = STEPS * STEP_TOKENS
    assert ledger["sources"]["general"]["tokens"] == whole // 2 + whole // 4  # nothing is made up for
    assert ledger["blend"]["tokens"] == whole


def test_phases_follow_on_each_other_and_a_killed_run_finds_its_own(
    pool: RankPool, inputs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    whole = write_config(inputs, tmp_path, "whole", {"tp": 2}, PHASES)
    assert pool.run(whole, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    rows = steps(tmp_path / "whole")
    assert [row["phase"] for row in rows] == ["foundation"] * 4 + ["evolution"] * 3 + ["mastery"] * 1
    assert [row["consumed_tokens"] for row in rows] == [256, 512, 768, 1024, 1536, 2048, 2560, 3072]
    assert rows[3]["tokens_by_source"] == {"domain": 512, "general": 512}
    assert rows[-1]["share_by_source"] == {"domain": 1.0, "general": 0.0}
    assert rows[3]["lr"] < rows[4]["lr"] > rows[-1]["lr"] > 0
    events = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["phase"] for row in events if row.get("event") == "phase"] == [p["name"] for p in PHASES]
    kept = [marker.consumed_tokens for _, marker in complete_checkpoints(tmp_path / "whole" / "checkpoints")]
    assert kept == [3072, 2560, 1024]  # the newest, and the end of each phase

    stopping = [PHASES[0] | {"then": "stop"}, *PHASES[1:]]
    cut = write_config(inputs, tmp_path, "cut", {"tp": 2}, stopping)
    assert pool.run(cut, ranks=2, log=log) == [75, 75], log.read_text()[-3000:]
    assert "phase foundation is done" in log.read_text()
    pids = pool.start(cut, ranks=2, log=log)
    while len(steps(tmp_path / "cut")) < 6 and not pool.have_ended():
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGKILL)
    pool.wait()
    assert pool.run(cut, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    last = {row[0]: row for row in seen(tmp_path / "cut", "lr", "phase", "tokens_by_source")}
    assert list(last.values()) == seen(tmp_path / "whole", "lr", "phase", "tokens_by_source")
