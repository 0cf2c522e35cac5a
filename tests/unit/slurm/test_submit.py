"""`megatron-cpt submit`: everything is checked before anything is written. Slurm is played by a few shell scripts."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.runs.folder import RunFolder, read_resolved
from megatron_cpt.slurm.journal import read_journal
from megatron_cpt.slurm.preflight import exclude
from tests.configs import write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

REPO = Path(__file__).resolve().parents[3]
# It numbers its jobs from 101, and notes each call; a partition `full` is one that it knows and does not accept.
SBATCH = """
case " $* " in *" --test-only "*) grep -q 'partition=full' && { echo 'sbatch: error: Batch job submission failed: \
Requested node configuration is not available' >&2; exit 1; }; exit 0;; esac
echo "$PWD $*" >> CALLS
echo $((100 + $(wc -l < CALLS)))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_dataset(folder / "data", random_documents(200, 128, 1))
    return folder


class Login:
    """A login node: a folder to work in, Slurm's commands on the PATH, and what they were called with."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.folder, self.inputs, self.calls_file = folder, inputs, folder / "calls"
        (folder / "bin").mkdir()
        self.add("sbatch", SBATCH.replace("CALLS", str(self.calls_file)))
        self.add("sinfo", "printf 'gpu\\nfull\\n'")
        self.add(
            "squeue",
            f"echo 'JOBID|STATE|REASON|NODELIST|START_TIME|TIME_LEFT|COMMAND'; cat {folder}/queue 2>/dev/null; true",
        )
        self.add("srun", "echo '  --mpi  '")

    def add(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def config(self, **sections: Any) -> Path:
        shared = {"model": {"init_from": str(self.inputs / "model")}}
        shared["data"] = {"train": [{"name": "data", "prefix": str(self.inputs / "data")}]}
        return write_tiny_run(self.folder, **(shared | sections))

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{REPO}:{self.folder}",
        }
        return subprocess.run(
            [sys.executable, "-m", "megatron_cpt", "submit", *arguments],
            cwd=self.folder, env=environ, text=True, capture_output=True, check=False,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")


@pytest.fixture
def login(tmp_path: Path, inputs: Path) -> Login:
    return Login(tmp_path, inputs)


def test_a_dry_run_prints_the_script_and_touches_nothing(login: Login) -> None:
    path = login.config()
    before = sorted(login.folder.rglob("*"))
    done = login.submit(str(path), "--dry-run", "--time", "2:00:00", "--partition", "gpu", "parallel.gpus_per_node=2")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=0-02:00:00\n#SBATCH --signal=B:USR1@120\n" in done.stdout
    assert "#SBATCH --gpus-per-node=2\n" in done.stdout
    assert (sorted(login.folder.rglob("*")), login.calls) == (before, [])


def test_a_run_folder_can_be_relaunched_by_its_own_script(login: Login) -> None:
    done = login.submit(str(login.config()), "budget.train_tokens=8192", "--chain", "3", "--json")
    assert done.returncode == 0, done.stderr
    script = login.run.root / "submit.sbatch"
    assert json.loads(done.stdout) == {
        "jobs": ["101", "102", "103"], "folder": str(login.run.root), "script": str(script),
    }  # fmt: skip
    assert login.calls == [
        f"{login.folder} --parsable {script}",
        f"{login.folder} --parsable --dependency=afterany:101 {script}",
        f"{login.folder} --parsable --dependency=afterany:102 {script}",
    ]
    assert [event["job"] for event in read_journal(login.run)] == ["101", "102", "103"]
    assert read_resolved(login.run).budget.train_tokens == 8192
    assert yaml.safe_load((login.run.root / "submitted.yaml").read_text())["budget"]["train_tokens"] == 8192
    assert f"CONFIG=${{CONFIG:-{login.run.root}/submitted.yaml}}" in script.read_text()
    assert (login.run.root / "code.txt").read_text().startswith("megatron-cpt ")
    assert not login.run.history.exists()  # no attempt was made yet


def test_excluded_nodes_of_a_run_stay_excluded_when_it_is_submitted_anew(login: Login) -> None:
    assert login.submit(str(login.config())).returncode == 0
    exclude(login.run, {"node3": "computation: wrong result"})
    done = login.submit(str(login.config()), "--dry-run")
    assert "#SBATCH --exclude=node3\n" in done.stdout, done.stderr


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(login: Login) -> None:
    assert login.submit(str(login.config())).returncode == 0
    (login.folder / "queue").write_text("101|RUNNING|None|node1|now|1:00|submit.sbatch\n")
    done = login.submit(str(login.config()))
    assert done.returncode == 2 and "has a job in the queue: 101" in done.stderr
    assert len(login.calls) == 1


@pytest.mark.parametrize(("text", "words"), [
    ("echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1", "Unable to contact controller"),
    ("echo 'maintenance until noon'", "squeue did not answer with a list of jobs, but 'maintenance until noon'"),
])  # fmt: skip
def test_where_slurm_does_not_say_what_is_queued_nothing_is_submitted(login: Login, text: str, words: str) -> None:
    """Else two jobs would train one run."""
    assert login.submit(str(login.config())).returncode == 0
    login.add("squeue", text)
    done = login.submit(str(login.config()))
    assert (done.returncode, len(login.calls)) == (2, 1) and words in done.stderr, done.stderr


def test_the_job_id_is_found_in_what_a_site_adds_to_it(login: Login) -> None:
    login.add("sbatch", SBATCH.replace("CALLS", str(login.calls_file)) + "echo '1 hour is charged to lab'\n")
    login.add("sbatch", f"echo 'Welcome to cluster 7'\n{(login.folder / 'bin/sbatch').read_text()}")
    done = login.submit(str(login.config()), "--chain", "2", "--json")
    assert json.loads(done.stdout)["jobs"] == ["101", "102"], done.stderr
    login.run.resolved.parent.joinpath("slurm.jsonl").unlink()
    login.add("sbatch", "echo queued")
    done = login.submit(str(login.config()))
    assert done.returncode == 2 and "sbatch did not say one job id, but 'queued'" in done.stderr, done.stderr


@pytest.mark.parametrize("scancel", ["works", "fails"])
def test_of_a_chain_that_is_refused_in_the_middle_nothing_stays(login: Login, scancel: str) -> None:
    refuse = "case \"$*\" in *afterany:102*) echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; esac\n"
    login.add("sbatch", refuse + SBATCH.replace("CALLS", str(login.calls_file)))
    login.add("scancel", f'echo "$*" > {login.folder}/cancelled' if scancel == "works" else "exit 1")
    done = login.submit(str(login.config()), "--chain", "3")
    assert done.returncode == 2 and "QOSMaxSubmitJobPerUserLimit" in done.stderr, done.stderr
    if scancel == "works":
        assert (login.folder / "cancelled").read_text() == "101 102\n"
    else:
        assert "jobs 101, 102 stay in the queue (exit code 1): scancel 101 102" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel.tp=3"], "parallel.tp"),
        (["budget.train_tokns=1"], "budget.train_tokns"),
        (["data.train.0.prefix=/nowhere/x"], "/nowhere/x"),
        (["--partition", "gpus"], "the cluster has no partition gpus\nhint: one of full, gpu"),
        (["--partition", "full"], "Slurm does not accept the job: Batch job submission failed: Requested node"),
        (["--time", "2"], "the time limit is 0-00:02:00, shorter than a start and one save"),
        (["--time", "soon"], "'soon' is not a time limit"),
        (["--cluster-env", "other.env"], "other.env does not exist"),
        (["run_dir=config.yaml/run"], "cannot write"),
        (["run_dir=/proc/run"], "0 are free in /proc"),
        (["model.init_from=/nowhere/model"], "/nowhere/model"),
        (["job_name=a\"b"], "job"),
        (["--no-such-option"], "no such option: --no-such-option"),
    ],
)  # fmt: skip
def test_after_an_error_nothing_is_in_the_queue(login: Login, arguments: list[str], words: str) -> None:
    done = login.submit(str(login.config()), *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert login.calls == [] and not login.run.root.exists()


def test_all_that_would_stop_the_run_is_said_at_once(login: Login) -> None:
    """As `plan --strict` says it: here a dataset that is not there, and the kill switch."""
    login.run.root.mkdir()
    (login.run.root / "KILL").touch()
    done = login.submit(str(login.config()), "data.train.0.prefix=/nowhere/x")
    assert done.returncode == 76 and "2 things would stop this run" in done.stderr
    assert "/nowhere/x" in done.stderr and "KILL is there" in done.stderr and login.calls == []


def test_the_packages_of_this_machine_matter_unless_the_run_has_its_own(login: Login) -> None:
    """The batch script names a container: what Python has here says nothing of it."""
    login.add("srun", "echo '  --container-image=...  '")
    (login.folder / "c.env").write_text("CONTAINER_IMAGE=nvcr.io#nvidia/pytorch\n")
    wants = (str(login.config()), "log.tensorboard=true", "--dry-run")
    (login.folder / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'tensorboard' else find(name, *more)\n"
    )
    done = login.submit(*wants)
    assert done.returncode == 2 and "needs the package tensorboard" in done.stderr, done.stderr
    assert login.submit(*wants, "--cluster-env", "c.env").returncode == 0


def test_a_container_needs_a_srun_that_knows_containers(login: Login) -> None:
    (login.folder / "c.env").write_text("CONTAINER_IMAGE=nvcr.io#nvidia/pytorch\n")
    done = login.submit(str(login.config()), "--cluster-env", "c.env")
    assert done.returncode == 2 and "srun has no --container-image here" in done.stderr
    login.add("srun", "echo '  --container-image=...  '")
    assert login.submit(str(login.config()), "--cluster-env", "c.env").returncode == 0


def test_without_sbatch_the_script_can_still_be_printed(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    (login.folder / "bin/sbatch").unlink()
    monkeypatch.setenv("PATH", "/usr/sbin:/sbin")  # where there is no sbatch
    (login.folder / "bin/bash").symlink_to("/bin/bash")
    (login.folder / "bin/env").symlink_to("/usr/bin/env")
    done = login.submit(str(login.config()))
    assert done.returncode == 2 and "sbatch is not on this machine" in done.stderr, done.stderr
    assert login.submit(str(login.config()), "--dry-run").returncode == 0


def test_a_conversion_is_planned_before_it_is_submitted(login: Login) -> None:
    model = str(login.inputs / "model")
    done = login.submit("convert", model, "out", "--to", "torch_dist", "--workers", "3")
    assert done.returncode == 0, done.stderr
    script = (login.folder / "out.slurm/submit.sbatch").read_text()
    assert f"set -- {model} out --to torch_dist --workers 3\n" in script
    assert 'command=(megatron-cpt convert --workers "${SLURM_CPUS_PER_TASK:-1}" "$@")' in script
    for wrong in (["convert", "/nowhere", "out", "--to", "hf"], ["convert", model, "out"], ["eval", "perplexity", "x"]):
        done = login.submit(*wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(login.calls) == 1


def test_an_evaluation_asks_for_one_gpu(login: Login) -> None:
    done = login.submit("eval", "perplexity", str(login.inputs / "model"), "--data", str(login.inputs / "data"))
    assert done.returncode == 0, done.stderr
    script = (login.folder / "eval-perplexity-model.slurm/submit.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=1\n" in script and "command=(megatron-cpt eval perplexity " in script


def corpus(login: Login, **more: Any) -> Path:
    (login.folder / "a.jsonl").write_text('{"text": "a"}\n')
    path = login.folder / "corpus.yaml"
    path.write_text(
        yaml.safe_dump({"output_prefix": "out/set", "tokenizer": "m", "sources": [{"files": "a.jsonl"}], **more})
    )
    return path


def test_a_corpus_is_an_array_and_a_job_that_joins_it(login: Login) -> None:
    done = login.submit(str(corpus(login)), "--tasks", "5")
    assert done.returncode == 0, done.stderr
    parts, join = (login.folder / f"out/set.slurm/{name}.sbatch" for name in ("parts", "join"))
    assert [call.split(" ", 1)[1] for call in login.calls] == [
        f"--parsable {parts}", f"--parsable --dependency=afterany:101 {join}",
    ]  # fmt: skip
    assert "#SBATCH --array=0-4\n" in parts.read_text() and "--array=0-" not in join.read_text().split("set -uo")[0]


def test_a_corpus_with_passages_needs_the_array_twice(login: Login) -> None:
    done = login.submit(str(corpus(login, dedup={"passages": True})))
    assert done.returncode == 0, done.stderr
    assert [call.split("/")[-1] for call in login.calls] == ["parts.sbatch", "parts.sbatch", "join.sbatch"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "gpus"], "the cluster has no partition gpus"),
        (["--time", "soon"], "'soon' is not a time limit"),
        (["--cluster-env", "c.env"], "CONTAINER_IMAGE=/nowhere/x.sqsh in c.env does not exist"),
    ],
)
@pytest.mark.parametrize("target", ["corpus", "eval"])
def test_other_jobs_are_refused_for_the_same_mistakes(
    login: Login, target: str, arguments: list[str], words: str
) -> None:
    (login.folder / "c.env").write_text("CONTAINER_IMAGE=/nowhere/x.sqsh\n")
    evaluation = ["eval", "perplexity", str(login.inputs / "model"), "--data", str(login.inputs / "data")]
    before = [str(corpus(login))] if target == "corpus" else evaluation
    refused(login, [*before, *arguments], words)


def refused(login: Login, arguments: list[str], words: str) -> None:
    before = sorted(login.folder.rglob("*"))
    done = login.submit(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (login.calls, sorted(login.folder.rglob("*"))) == ([], before)


@pytest.mark.parametrize(
    ("more", "options", "words"),
    [
        ({"sources": [{"files": "nowhere.jsonl"}]}, [], "nowhere.jsonl"),
        ({"tokenizerr": 1}, [], "is not a key of the corpus"),
        ({"output_prefix": "/proc/out/set"}, [], "cannot write /proc/out/set.slurm"),
        ({}, ["--tasks", "0"], "--tasks: 0 is not in the range 1<=x<=10000"),
        ({}, ["--tasks", "many"], "--tasks: 'many' is not a valid integer"),
    ],
)
def test_a_corpus_that_cannot_be_made_is_not_submitted(
    login: Login, more: dict[str, Any], options: list[str], words: str
) -> None:
    refused(login, [str(corpus(login, **more)), *options], words)


def test_an_evaluation_of_nothing_is_not_submitted(login: Login) -> None:
    model = str(login.inputs / "model")
    refused(login, ["eval", "perplexity", model, "--data", "/nowhere/data"], "/nowhere/data does not exist")
    refused(login, ["convert", model, "/proc/out", "--to", "torch_dist"], "cannot write /proc/out.slurm")


def test_the_tasks_of_an_evaluation_are_names(login: Login) -> None:
    model = str(login.inputs / "model")
    done = login.submit("eval", "tasks", model, "--tasks", "pubmedqa,my.yaml", "--limit", "5", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"set -- {model} --limit 5 --tasks pubmedqa,my.yaml\n" in done.stdout
