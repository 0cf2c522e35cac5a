"""`megatron-cpt plan`: the whole page, what it refuses, and that it needs neither torch nor a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.cli import cli
from megatron_cpt.launch import preflight
from megatron_cpt.presets import presets
from tests.configs import write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

REPO = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).with_name("golden")
EXAMPLE = "examples/qwen2_72b/config.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def plan(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["plan", *map(str, arguments)])
    said = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, said


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen2_72b", ["--price-per-gpu-hour", "2"]),
        ("qwen2_72b_a800", ["--hardware", "a800-80g", "parallel.tp=4", "recompute.granularity=full"]),
        ("qwen2_72b_search", ["--search"]),
    ],
)
def test_the_page_of_the_example_is_the_one_that_was_looked_at(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPT_UPDATE_GOLDEN=1 writes the pages again, to be read before they are committed."""
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 10**15)  # not of this machine
    code, page, said = plan(EXAMPLE, *arguments)
    assert code == 0, said
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("CPT_UPDATE_GOLDEN"):
        path.write_text(page)
    assert page == path.read_text()


def test_it_takes_less_than_a_second_and_no_torch() -> None:
    script = (
        "import sys, time\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "start = time.process_time()\n"
        "from megatron_cpt.cli import cli\n"
        f"cli.main(['plan', '{EXAMPLE}'], standalone_mode=False)\n"
        "print(time.process_time() - start, file=sys.stderr)\n"
    )
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert "72,706,203,648" in done.stdout
    assert float(done.stderr.splitlines()[-1]) < 1.0
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("name", presets())
def test_every_preset_plans_on_32_gpus_and_fits(name: str, tmp_path: Path) -> None:
    started = CliRunner().invoke(cli, ["init", "--preset", name, "--gpus", "32", "--to", str(tmp_path / "job")])
    assert started.exit_code == 0, started.output
    code, printed, said = plan(tmp_path / "job" / "config.yaml", "--json")
    assert code == 0, said
    assert json.loads(printed)["verdict"] == "fits"


def test_json_holds_the_predictions_in_bytes_and_hours() -> None:
    _, printed, _ = plan(EXAMPLE, "--json", "--search")
    found = json.loads(printed)
    assert found["parameters"] == 72_706_203_648
    assert [stage["total"] for stage in found["memory"]] == sorted((s["total"] for s in found["memory"]), reverse=True)
    assert found["headroom_bytes"] == found["hardware"]["memory_bytes"] - found["memory"][0]["total"]
    tokens_per_s, hours = found["throughput"]["tokens_per_s"], found["cost"]["hours"]
    assert hours == pytest.approx(found["train_tokens"] / tokens_per_s / 3600)
    assert found["cost"]["hours_low"] < hours < found["cost"]["hours_high"]
    assert found["disk"]["peak_bytes"] == 4 * found["disk"]["checkpoint_bytes"]
    assert len(found["missing_here"]) >= 5 and len(found["search"]["best"]) == 10


def test_strict_refuses_what_is_missing_here_all_at_once() -> None:
    code, page, said = plan(EXAMPLE, "--strict")
    assert code != 0 and page == ""
    for part in ("data/domain_train", "data/general_valid", "/models/Qwen2-72B", "hint:"):
        assert part in said


def test_strict_refuses_what_does_not_fit(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    config = write_tiny_run(tmp_path)
    assert plan(config, "--strict")[0] == 0
    code, _, said = plan(EXAMPLE, "--strict", "parallel.pp=1", "--hardware", "a100-40g")
    assert code != 0 and "needs" in said and "a100-40g has 39.4" in said
    code, page, _ = plan(EXAMPLE, "parallel.pp=1", "--hardware", "a100-40g")
    assert code == 0 and "does not fit" in page and "too much on stage 0" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hardware", "h100"], "did you mean 'h100-80g'?"),
        (["--hardware", "tpu"], "known are"),
        (["--search", "--gpus", "30"], "24 or 32"),
        (["budget.train_tokens=5"], "smaller than one step"),
        (["parallel.tp=3", "parallel.pp=7", "batch.global_batch_size=7"], "one of [1, 2, 4, 8]"),
    ],
)
def test_nonsense_is_one_error_with_legal_values(arguments: list[str], says: str) -> None:
    code, page, said = plan(EXAMPLE, *arguments)
    assert code != 0 and page == "" and says in said


def test_a_config_for_another_command_is_named() -> None:
    code, _, said = plan("examples/medical/corpus.yaml")
    assert code != 0 and "describes a corpus" in said


def test_surprises_and_advice_are_said_with_their_evidence(tmp_path: Path) -> None:
    code, page, _ = plan(
        EXAMPLE, "optimizer.lr=1e-4", "budget.warmup_tokens=150M", "checkpoint.save_every=1000 tokens",
        "data.train=[{name: domain, prefix: data/domain}]", "budget.train_tokens=500M", "schedule.decay_tokens=5M",
    )  # fmt: skip
    assert code == 0
    for part in (
        "save_every = 1K tokens is less than a step of 1,048,576 tokens",
        "tokens are few",
        "above 5e-06 to 3e-05",
        "the warm-up is 30.0%",
        "one training source",
        "arXiv:2403.08763",
        "the decay is 1.0%",
    ):
        assert part in " ".join(page.split()), page


def test_validation_is_part_of_the_time_where_its_size_is_known(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    valid = write_dataset(tmp_path / "valid", random_documents(60, 128, 2))
    config = write_tiny_run(tmp_path, data={"validation": {"v": str(valid)}}, eval={"every": "1 iters"})
    _, printed, said = plan(config, "--json")
    found = json.loads(printed)
    assert found["cost"]["validation_hours"] > 0, said


@pytest.mark.parametrize("arguments", [(), ("parallel.vpp=5",), ("parallel.pp=1", "parallel.tp=8")])
def test_pictures_are_one_file_that_loads_nothing_and_the_same_each_time(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 10**15)  # not of this machine
    written = []
    for number in range(2):
        path = tmp_path / f"{number}.html"
        code, page, said = plan(EXAMPLE, *arguments, "--picture", path)
        assert code == 0 and f"wrote {path}" in page, said
        written.append(path.read_text())
    assert written[0] == written[1]
    assert "<svg" in written[0] and "stage 0" in written[0] and "72,706,203,648" in written[0]
    for outside in ("src=", "<script", "@import", "url(http"):
        assert outside not in written[0]


def test_a_png_is_a_png_and_another_ending_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, said = plan(EXAMPLE, "--picture", tmp_path / "plan.png")
    assert code == 0, said
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, said = plan(EXAMPLE, "--picture", tmp_path / "plan.pdf")
    assert code != 0 and ".html or .png" in said
    (tmp_path / "file").write_text("")
    code, _, said = plan(EXAMPLE, "--picture", tmp_path / "file" / "plan.png")
    assert code != 0 and "cannot be written" in said


def test_the_examples_of_the_data_mix_plan_with_their_phases_and_shares() -> None:
    code, page, said = plan("examples/curriculum/config.yaml")
    assert code == 0, said
    assert "medical           50.0% to 90.0% of the tokens" in page
    for name, share in (("medical", "5.0%"), ("code", "25.0%")):
        code, page, said = plan(f"examples/{name}/config.yaml")
        assert code == 0, said
        assert re.search(rf"general +{share} of the tokens", page)
    code, page, said = plan("examples/phases_code/config.yaml")
    assert code == 0, said
    assert "1,400,000,000 to 1,500,512,256 tokens, a step of 128 samples x 8192" in page
    assert "pulls             4.7% of the tokens" in page and "never decays" not in page
    code, page, said = plan("examples/phases_code/config.yaml", "phases.2.rate={course: continue}")
    assert "never decays" in page, said  # negative control
