"""Runs whose shares change, from config alone on real ranks: what was given, resume, and no effect."""

from __future__ import annotations

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


def write_config(inputs: Path, folder: Path, run: str, parallel: dict[str, Any] | None = None, **data: Any) -> Path:
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
