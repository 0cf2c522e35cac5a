"""One cluster for all tests of this folder, and the runs that they disturb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.metrics import Row, read_metrics, read_rows
from megatron_cpt.slurm.journal import Event, read_journal
from tests.configs import write_tiny_run
from tests.slurm.cluster import Cluster, cluster_up, until, why_not
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

REPO = Path(__file__).resolve().parents[2]
NODES = 34  # 32 for a job, and two to spare
STEPS = 60
TOKENS_PER_STEP = 512
REQUIRED = "MEGATRON_CPT_REQUIRE_SLURM"  # set in CI: there these tests must not be skipped


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        assert not os.environ.get(REQUIRED), reason
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster_up(Path(folder) / "c", NODES) as found:
        yield found


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> Path:
    """Write `model`, the dataset `data`, and the site's file `cluster.env`. Return the folder."""
    write_model(folder / "model")
    write_dataset(folder / "data", random_documents(800, 128, 1))
    programs = Path(sys.executable).parent
    (folder / "cluster.env").write_text(
        f"export PATH={programs}:$PATH PYTHONPATH={REPO} GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1\n"
    )
    return folder


class Job:
    """A run on two nodes with one process each, and the job of the cluster that trains it."""

    def __init__(self, cluster: Cluster, inputs: Path, folder: Path, **sections: Any) -> None:
        self.cluster, self.inputs, self.folder = cluster, inputs, folder
        shared: dict[str, Any] = {
            "model": {"init_from": str(inputs / "model")},
            "data": {"train": [{"name": "data", "prefix": str(inputs / "data")}], "max_epochs": 1e6},
            "budget": {"train_tokens": STEPS * TOKENS_PER_STEP},
            "parallel": {"nodes": 2, "pp": 2},
            "checkpoint": {"save_every": "10 iters"},
        }
        for name, values in sections.items():
            shared[name] = {**shared.get(name, {}), **values} if isinstance(values, dict) else values
        self.config = write_tiny_run(folder, **shared)
        self.run = RunFolder(folder / "run")
        self.job = ""

    def submit_command(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`megatron-cpt submit` on the login node."""
        site = ["--cluster-env", str(self.inputs / "cluster.env"), "--json", *options]
        return self.cluster.call(
            sys.executable, "-m", "megatron_cpt", "submit", str(self.config), *site, cwd=self.folder
        )

    def submit(self, *options: str) -> list[str]:
        """Submit the run. Return the ids of the jobs."""
        done = self.submit_command(*options)
        assert done.returncode == 0, done.stderr
        jobs: list[str] = json.loads(done.stdout)["jobs"]
        self.job = jobs[0]
        return jobs

    def sbatch(self, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Call sbatch with the run's own script. Return the id of the job."""
        script = str(self.run.root / "submit.sbatch")
        self.job = self.cluster.ask("sbatch", "--parsable", *options, script, *arguments)
        return self.job

    def has_reached(self, iteration: int, attempt: int = 1) -> bool:
        rows = read_rows(self.run.metrics)[0]
        return any(row.get("start") == attempt and "loss" in row and row["iteration"] >= iteration for row in rows)

    def wait_for_step(self, iteration: int, attempt: int = 1, seconds: float = 180) -> None:
        what = f"step {iteration} of attempt {attempt}"
        until(lambda: self.has_reached(iteration, attempt), what, seconds, self.describe)

    def ended(self, job: str | None = None, seconds: float = 240) -> int:
        return self.cluster.exit_code(job or self.job, seconds)

    def ranks(self, node: str) -> list[int]:
        return self.cluster.processes(node, "megatron-cpt train")

    def journal(self, event: str) -> list[Event]:
        return [row for row in read_journal(self.run) if row["event"] == event]

    def causes(self) -> list[str]:
        return [row["cause"] for row in self.journal("ended")]

    def losses(self) -> dict[int, float]:
        return {row["iteration"]: row["loss"] for row in self.steps()}

    def steps(self) -> list[Row]:
        return [row for row in read_metrics(self.run.metrics) if "event" not in row]

    def status(self) -> dict[str, Any]:
        """What `megatron-cpt status --json` says on the login node."""
        found: dict[str, Any] = json.loads(
            self.cluster.ask(sys.executable, "-m", "megatron_cpt", "status", str(self.run.root), "--json")
        )
        return found

    def describe(self) -> str:
        logs = sorted(self.run.root.glob("logs/**/*.log"), key=lambda path: path.stat().st_mtime)
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs[-5:]]
        return "\n".join([self.cluster.ask("squeue", check=False), *texts])


@pytest.fixture
def job(cluster: Cluster, inputs: Path, tmp_path: Path) -> Iterator[Job]:
    """A run that is not submitted yet; whatever it left in the queue is cancelled afterwards."""
    yield Job(cluster, inputs, tmp_path)
    clean_up(cluster)


def clean_up(cluster: Cluster) -> None:
    cluster.ask("scancel", "--user=root")
    until(lambda: cluster.ask("squeue", "-h") == "", "the queue is empty", 60)
    until(
        lambda: cluster.states().count("idle") == cluster.count, "all nodes are idle", 60, lambda: cluster.ask("sinfo")
    )


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss of every step of the run that the other tests disturb."""
    quiet = Job(cluster, inputs, tmp_path_factory.mktemp("undisturbed"))
    quiet.submit()
    assert quiet.ended() == 0, quiet.describe()
    losses = quiet.losses()
    assert list(losses) == list(range(1, STEPS + 1)) and len(set(losses.values())) > STEPS // 2
    return losses
