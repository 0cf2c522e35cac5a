"""The command line: conventions that every subcommand shares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
EXAMPLE = "examples/qwen2_72b/config.yaml"


def cpt(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_cpt", *args], cwd=REPO, text=True, capture_output=True, check=False
    )


def test_help_and_plan_need_neither_torch_nor_megatron() -> None:
    """A login node without them can check a config; and the command line answers at once."""
    script = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "from megatron_cpt.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        f"cli.main(['plan', '{EXAMPLE}'], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1,431 iterations" in done.stdout


def test_help_imports_no_command() -> None:
    script = (
        "import sys\nfrom megatron_cpt.cli import cli\ncli.main(['--help'], standalone_mode=False)\n"
        "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'pyarrow', 'rich') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_json_is_one_object_with_the_contract_names() -> None:
    done = cpt("plan", EXAMPLE, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    expected = {
        "tokens_per_step": 1_048_576,
        "train_iters": 1431,
        "train_tokens": 1_500_512_256,
        "data_parallel_size": 1,
        "gradient_accumulation_steps": 256,
    }
    assert {key: plan[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["plan", "missing.yaml"], "missing.yaml"),
        (["plan", EXAMPLE, "parallel.tpp=2"], "did you mean 'parallel.tp'?"),
        (["plan", EXAMPLE, "parallel.tp=3"], "64 attention heads"),
        (["plan", EXAMPLE, "train_tokens=5"], "smaller than one step"),
        (["plan", EXAMPLE, "model.architecture=/nowhere"], "/nowhere"),
        (["plann", EXAMPLE], "did you mean 'plan'?"),
    ],
)
def test_a_user_error_is_exit_2_with_one_message_and_a_hint(args: list[str], what: str) -> None:
    done = cpt(*args)
    assert done.returncode == 2
    assert what in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
