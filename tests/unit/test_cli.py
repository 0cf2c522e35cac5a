"""The command line: conventions that every subcommand shares."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.cli import COMMANDS, cli, run

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


def test_help_lists_the_commands_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(cli, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    where = {line.split()[0].rstrip(":"): number for number, line in enumerate(lines) if line.strip()}
    assert where["Data"] < where["preprocess"] < where["Run"] < where["train"] < where["Model"] < where["convert"]
    columns = {lines[where[name]].index(COMMANDS[name].help[:20]) for name in ("merge", "status", "convert")}
    assert len(columns) == 1


def test_verbose_shows_where_an_expected_error_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        run(cli, ["plan", "missing.yaml"])
    assert not caplog.records
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit):
        run(cli, ["plan", "missing.yaml"])
    assert "ConfigError" in caplog.text


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("CPT", f"{sys.executable} -m megatron_cpt")
    return subprocess.run(["bash", "-c", line], cwd=REPO, text=True, capture_output=True, check=False)


def test_a_reader_who_leaves_is_no_error() -> None:
    done = shell(f"CPT plan {EXAMPLE} | :; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("line", [f"CPT plan {EXAMPLE}", f"CPT plan {EXAMPLE} --json", "CPT --help", "CPT --version"])
def test_output_that_cannot_be_written_is_one_clear_error(line: str) -> None:
    done = shell(f"{line} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: the output could not be written: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("end", ["2> /dev/full", "2>&-", "2>&1 > /dev/null | :"])
def test_errors_that_cannot_be_shown_keep_their_exit_code(end: str) -> None:
    assert shell(f"CPT plan missing.yaml {end}; echo ${{PIPESTATUS[0]}}").stdout == "2\n"


def test_closed_stdout_and_stderr_change_nothing() -> None:
    assert shell(f"(CPT plan {EXAMPLE} >&- 2>&-; echo $? >&3) 3>&1").stdout == "0\n"


@pytest.mark.parametrize(("words", "offered"), [("pl", "plain,plan"), ("status --js", "plain,--json")])
def test_a_shell_completes_commands_and_flags(words: str, offered: str) -> None:
    line = f"megatron-cpt {words}"
    environment = {**os.environ, "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    environment["_MEGATRON_CPT_COMPLETE"] = "bash_complete"
    command = [sys.executable, "-m", "megatron_cpt"]
    done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=False, env=environment)
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_completion_scripts_name_the_command(shell: str) -> None:
    assert f"_MEGATRON_CPT_COMPLETE={shell}_source" in (REPO / "docs" / "install.md").read_text()
    environment = {**os.environ, "_MEGATRON_CPT_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-m", "megatron_cpt"]
    done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=False, env=environment)
    assert f"_MEGATRON_CPT_COMPLETE={shell}_complete" in done.stdout and "megatron-cpt" in done.stdout, done.stderr
