"""Batch scripts as text: what is shipped, what a submission writes, and that the shell understands all of it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm.script import (
    ArrayJob,
    CommandJob,
    Place,
    TrainJob,
    array_script,
    command_script,
    literal,
    shipped_scripts,
    train_script,
)
from megatron_cpt.slurm.site import Site

REPO = Path(__file__).resolve().parents[3]
GOLDEN = REPO / "tests/golden"
JOB = TrainJob("tiny", "/runs/a b/submitted.yaml", 2, 4, 7200, 120)
SITE = Site(account="lab", partition="gpu", cluster_env="/site/cluster.env")
PLACE = Place("/runs/tiny/submit.sbatch", "/runs/tiny/logs/slurm-%j.log", "/jobs", ("node7", "node9"))


def same_as_file(text: str, path: Path) -> None:
    """Compare with a file under version control; UPDATE_GOLDEN=1 writes it, to be reviewed as text."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; UPDATE_GOLDEN=1 writes it"


def directives(text: str) -> dict[str, str | None]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {name: value or None for name, value in found}


@pytest.mark.parametrize("name", ["qwen2_72b_cpt.sbatch", "preprocess.sbatch", "convert.sbatch"])
def test_the_shipped_scripts_are_what_the_functions_write(name: str) -> None:
    scripts = shipped_scripts()
    assert {path.name for path in (REPO / "slurm").glob("*.sbatch")} == scripts.keys()
    same_as_file(scripts[name], REPO / "slurm" / name)


def test_scripts_of_a_submission_are_the_golden_ones() -> None:
    same_as_file(train_script(JOB, SITE, PLACE), GOLDEN / "submit_train.sbatch")
    corpus = ArrayJob("preprocess", "/data/corpus.yaml", 4, 8, None, "parts")
    same_as_file(array_script(corpus, SITE, PLACE), GOLDEN / "submit_parts.sbatch")
    words, arguments = ("eval", "perplexity"), ("export/it's", "--data", "data/x")
    job = CommandJob("eval", words, arguments, 8, 64, 1, 3600)
    same_as_file(command_script(job, SITE, PLACE), GOLDEN / "submit_eval.sbatch")


def test_the_shell_understands_every_script() -> None:
    texts = [*shipped_scripts().values(), *(path.read_text() for path in sorted(GOLDEN.glob("*.sbatch")))]
    assert len(texts) == 6
    for text in texts:
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_submission_differs_from_the_shipped_script_in_its_head_alone() -> None:
    def body(text: str) -> str:
        return text.split("\ncontainer=()", 1)[1]

    assert body(train_script(JOB, SITE, PLACE)) == body(shipped_scripts()["qwen2_72b_cpt.sbatch"])


def test_directives_say_what_the_job_the_site_and_the_run_folder_ask_for() -> None:
    found = directives(train_script(JOB, SITE, PLACE))
    assert found == {
        "job-name": "tiny",
        "account": "lab",
        "partition": "gpu",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "exclusive": None,
        "mem": "0",
        "time": "0-02:00:00",
        "signal": "B:USR1@120",
        "requeue": None,
        "open-mode": "append",
        "output": "/runs/tiny/logs/slurm-%j.log",
        "chdir": "/jobs",
        "exclude": "node7,node9",
    }
    without = directives(train_script(replace(JOB, time_limit_seconds=None), Site(), replace(PLACE, excluded=())))
    assert not {"time", "account", "partition", "exclude"} & without.keys()


def test_a_joining_job_has_no_array_and_the_parts_have_one() -> None:
    job = ArrayJob("preprocess", "c.yaml", 4, 8, None, "parts")
    assert directives(array_script(job, SITE, PLACE))["array"] == "0-3"
    assert "array" not in directives(array_script(replace(job, stage="join"), SITE, PLACE))


def test_the_config_may_have_a_space_and_a_quote_in_its_path() -> None:
    text = train_script(replace(JOB, config="/runs/it's a/x.yaml"), SITE, PLACE)
    line = next(line for line in text.splitlines() if line.startswith("CONFIG="))
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$CONFIG"'], text=True, capture_output=True, check=True)
    assert done.stdout == "/runs/it's a/x.yaml"


@pytest.mark.parametrize("value", ['a"b', "a\nb", "a'b", "a\\b"])
def test_a_value_that_would_break_out_of_its_line_is_refused(value: str) -> None:
    with pytest.raises(LaunchError, match="cannot stand in a batch script"):
        train_script(replace(JOB, name=value), SITE, PLACE)


def test_a_percent_sign_of_a_folder_is_no_pattern_of_sbatch() -> None:
    assert literal("/runs/50%j") == "/runs/50%%j"
