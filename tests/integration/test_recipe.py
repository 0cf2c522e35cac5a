"""`megatron-cpt recipe`: proposals with their evidence, a measured shift, and a pilot on real ranks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from megatron_cpt.cli import cli
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.train import pilot
from tests.configs import tiny_run
from tests.rank_pool import RankPool
from tests.synthetic_model import write_model
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["recipe", *map(str, arguments)])
    said = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, said


def proposals(*arguments: object) -> dict[str, dict[str, Any]]:
    code, out, said = run(*arguments, "--json")
    assert code == 0, said
    return {one["key"]: one for one in json.loads(out)["proposals"]}


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.mark.usefixtures("in_repository")
def test_a_large_model_gets_the_rates_of_its_budget_and_replay_of_its_shift() -> None:
    config = "examples/qwen2_72b/config.yaml"
    short = proposals(config, "--shift", "weak", "budget.train_tokens=1B")
    assert short["optimizer.lr"]["value"] == "1e-05" and short["optimizer.min_lr"]["value"] == "1e-06"
    assert int(short["budget.warmup_tokens"]["value"]) == pytest.approx(10_000_000, rel=1e-3)
    assert short["data.replay_ratio"]["value"] == "5%"
    long = proposals(config, "--shift", "strong", "budget.train_tokens=200B", "data.max_epochs=1e9")
    assert long["optimizer.lr"]["value"] == "0.0001" and long["data.replay_ratio"]["value"] == "25%"
    assert all(one["evidence"][-1] in "PSMI" for one in long.values())
    assert short["data.replay_ratio"]["requires"]  # the example has no general text to replay


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A domain whose letters the tokenizer has never seen, and general text that it was made from."""
    write_model(tmp_path / "model", vocab_size=403)
    build_tokenizer(tmp_path / "model")
    texts = {
        "domain": [f"ЩЖЮ {number} ЯЭЪ ФЫВ " * 8 for number in range(60)],
        "general": [f"{text} {number}" for number in range(90) for text in TEXTS],
    }
    for name, lines in texts.items():
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
        words = ["preprocess", "--input", str(tmp_path / f"{name}.jsonl"), "--output-prefix", str(tmp_path / name)]
        done = CliRunner().invoke(cli, [*words, "--tokenizer", str(tmp_path / "model")])
        assert done.exit_code == 0, done.exception
    sources = [
        {"name": "domain", "prefix": str(tmp_path / "domain")},
        {"name": "general", "prefix": str(tmp_path / "general"), "role": "replay"},
    ]
    sets = {"domain": str(tmp_path / "domain"), "general": str(tmp_path / "general")}
    data = {"train": sources, "validation": sets, "replay_ratio": 0.05, "max_epochs": 1e9}
    path = tmp_path / "config.yaml"
    tree = tiny_run(tmp_path, data=data, optimizer={"lr": 1e-2}, budget={"train_tokens": 100_000})
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_overrides_that_are_printed_are_accepted_by_plan(config: Path) -> None:
    code, out, said = run(config, "--shift", "strong")
    assert code == 0, said
    assert "'budget.train_tokens=" in out  # the domain would be read more than four times
    words = shlex.split(out.partition("as overrides, those you agree with:")[2])
    assert {word.partition("=")[0] for word in words} >= {"budget.warmup_tokens", "data.replay_ratio", "forgetting.kl"}
    planned = CliRunner().invoke(cli, ["plan", str(config), *words])
    assert planned.exit_code == 0, planned.exception
    again = proposals(config, "--shift", "strong", *words)
    assert again["data.replay_ratio"]["current"] == "0.25" and again["forgetting.kl"]["current"] == "weight 1"
    for key in ("budget.warmup_tokens", "schedule.decay_tokens", "schedule.kind"):
        assert again[key]["value"] == again[key]["current"]
    assert "budget.train_tokens" not in again


def test_the_shift_is_measured_by_the_base_models_bits_per_byte(config: Path) -> None:
    code, out, said = run(config, "--general", "general", "--json")
    assert code == 0, said
    told = json.loads(out)
    assert told["shift"] == "strong" and told["bits_per_byte"]["domain"] > 1.25 * told["bits_per_byte"]["general"]
    same = f"data.validation={{domain: {config.parent / 'general'}, general: {config.parent / 'general'}}}"
    code, out, said = run(config, same, "--general", "general", "--json")
    assert code == 0 and json.loads(out)["shift"] == "weak", said  # negative control
    code, _, said = run(config, "--json")
    assert code != 0 and "no validation set is general text" in said


def test_the_pilot_measures_shares_and_rates_once_and_proposes_what_it_measured(
    config: Path, pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def in_pool(trial: RunConfig, **_: Any) -> int:
        started.append(Path(trial.folder).name)
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(trial.model_dump(mode="json")))
        return pool.run(tmp_path / "trial.yaml", ranks=1, log=tmp_path / "log")[0]

    monkeypatch.setattr(pilot, "run_training", in_pool)
    arguments = (config, "--shift", "weak", "--general", "general", "--pilot", "--tokens", "3000", "--json")
    code, out, said = run(*arguments)
    assert code == 0, said
    found = json.loads(out)["pilot"]
    assert started[:3] == ["replay_0_lr_0.01", "replay_0.05_lr_0.01", "replay_0.25_lr_0.01"]
    assert len(started) == len(set(started)) <= 6
    rows = {(row["replay_ratio"], row["lr"]): row for row in found["rows"]}
    assert rows[0.25, 0.01]["general_loss"] < rows[0.0, 0.01]["general_loss"]
    at_share = [row for row in rows.values() if row["replay_ratio"] == found["replay_ratio"]]
    allowed = [row for row in at_share if row["general_rise"] <= found["max_rise"]]
    best = max(allowed, key=lambda row: row["domain_gain"])
    assert found["lr"] == best["lr"] and len(at_share) == 3
    count = len(started)
    assert run(*arguments)[1] == out and len(started) == count  # nothing is trained twice
    code, _, said = run(config, "data.train.1.role=domain", "data.replay_ratio=null", *arguments[1:])
    assert code != 0 and "no source of data.train has the role replay" in said
