"""What is accepted and what is refused, by a real Slurm: the shipped scripts, 32 nodes, and mistakes of a user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.corpus.dataset.manifest import read_manifest
from tests.slurm.conftest import REPO, STEPS, Job
from tests.slurm.test_other_jobs import write_corpus


def overrides(config: dict[str, Any], above: str = "") -> Iterator[str]:
    """`key.sub=value` for every value of `config`."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from overrides(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value)}"


def repository(folder: Path, job: Job) -> Path:
    """A checkout as far as the shipped scripts see it: the examples, and the site's file."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "examples").symlink_to(REPO / "examples")
    (folder / "slurm/cluster.env").symlink_to(job.inputs / "cluster.env")
    return folder


def test_the_shipped_script_trains_on_4_nodes_of_8_gpus_with_overrides_alone(
    job: Job, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """TP within the nodes, PP and DP across them; two processes per node, as this machine has few cores."""
    tiny = yaml.safe_load(job.config.read_text())
    tiny["model"]["architecture"] = tiny["eval.every"] = None
    tiny |= {"data.validation": {}, "schedule.kind": "cosine"}
    tiny["optimizer"] = {"lr": 5e-5, "min_lr": 5e-6}
    tiny["parallel"] = {"nodes": 4, "gpus_per_node": 2, "tp": 2, "pp": 2}
    where = repository(tmp_path / "checkout", job)
    script = str(REPO / "slurm/qwen2_72b_cpt.sbatch")
    done = job.cluster.call("sbatch", "--parsable", script, *overrides(tiny), cwd=where)
    assert done.returncode == 0, done.stderr
    job.job = done.stdout.strip()
    assert job.cluster.job_field(job.job, "TresPerNode") == "gres:gpu:8"
    assert job.ended() == 0, job.describe()
    assert len(job.cluster.nodes_of(job.job)) == 4
    losses = job.losses()
    assert len(losses) == STEPS and losses == pytest.approx(undisturbed, rel=1e-5)
    assert losses != undisturbed  # another layout rounds differently: it was really used
    assert len(list(job.run.logs.glob("job-*/rank_*.log"))) == 8


def test_one_sbatch_of_the_shipped_script_makes_a_corpus_and_joins_it(job: Job, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, "shipped", lines=500)
    where = repository(tmp_path / "checkout", job)
    script = str(REPO / "slurm/preprocess.sbatch")
    done = job.cluster.call("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", script, str(corpus), cwd=where)
    assert done.returncode == 0, done.stderr
    array = int(done.stdout)
    logs = lambda: "\n".join(path.read_text() for path in where.glob("*.log"))  # noqa: E731
    assert job.cluster.exit_code(f"{array}_0") == 0, logs()
    join = job.cluster.job_named("preprocess-join")
    assert job.cluster.exit_code(f"{join}_0") == 0, logs()
    assert read_manifest(tmp_path / "shipped").document_count > 100


def test_a_job_of_32_nodes_is_accepted_and_one_of_more_than_the_cluster_has_is_not(job: Job) -> None:
    layout = ("parallel.nodes=32", "parallel.gpus_per_node=8", "parallel.pp=4", "batch.global_batch_size=64")
    wide = job.submit_command("--dry-run", *layout)
    assert wide.returncode == 0, wide.stderr
    script = job.folder / "wide.sbatch"
    script.write_text(json.loads(wide.stdout)["script"])
    assert "--nodes=32" in script.read_text()
    tried = job.cluster.call("sbatch", "--test-only", str(script))
    assert tried.returncode == 0 and "to start at" in tried.stderr and "node[1-32]" in tried.stderr, tried.stderr
    nodes = job.cluster.count + 1
    more = job.submit_command(f"parallel.nodes={nodes}", "parallel.pp=1", f"batch.global_batch_size={nodes}")
    assert more.returncode == 2 and "Slurm does not accept the job: " in more.stderr, more.stderr


@pytest.mark.parametrize(
    ("arguments", "site", "words"),
    [
        (["budget.train_tokns=1"], "", "budget.train_tokns"),
        (["--partition", "gpus"], "", "the cluster has no partition gpus\nhint: one of gpu, urgent"),
        (["--time", "2"], "", "the time limit is 0-00:02:00, shorter than a start and one save"),
        (["run_dir=config.yaml/run"], "", "cannot write"),
        (["data.train.0.prefix=/nowhere/x", "model.init_from=/nowhere"], "", "/nowhere"),
        ([], "CONTAINER_IMAGE=/nowhere/image.sqsh", "CONTAINER_IMAGE=/nowhere/image.sqsh in"),
        ([], "CONTAINER_IMAGE=nvcr.io#nvidia/pytorch", "srun has no --container-image here"),
    ],
)  # fmt: skip
def test_after_a_mistake_nothing_is_submitted(job: Job, arguments: list[str], site: str, words: str) -> None:
    """One clear error, exit code 2, no run folder."""
    env = job.folder / "site.env"
    env.write_text(f"source {job.inputs / 'cluster.env'}\n{site}\n")
    done = job.submit_command("--cluster-env", str(env), *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert words in done.stderr and done.stderr.count("hint: ") == 1 and "Traceback" not in done.stderr
    assert job.cluster.ask("squeue", "-h") == "" and not job.run.root.exists()
