"""A corpus as an array with its joining job, and a conversion: killed, they end with the bytes of one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_cpt.corpus.staging import staging_path
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import clean_up
from tests.synthetic_model import write_model
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl

TASKS = 3


@pytest.fixture
def submit(cluster: Cluster, inputs: Path, tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """`megatron-cpt submit` on the login node. Returns the ids of the jobs."""

    def call(*words: str) -> list[str]:
        site = ["--cluster-env", str(inputs / "cluster.env"), "--cpus-per-task", "1", "--json"]
        done = cluster.call(sys.executable, "-m", "megatron_cpt", "submit", *words, *site, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        jobs: list[str] = json.loads(done.stdout)["jobs"]
        return jobs

    yield call
    clean_up(cluster)


def write_corpus(folder: Path, name: str, lines: int = 20_000) -> Path:
    """A corpus.yaml whose dataset is folder/NAME, over text that every caller shares: 4 files of so many lines."""
    files = [str(folder / f"text{number}.jsonl") for number in range(4)]
    for number, file in enumerate(files):
        if not Path(file).exists():
            write_jsonl(Path(file), [f"{TEXTS[i % len(TEXTS)]} {number} {i}" * 3 for i in range(lines)])
    raw = {
        "output_prefix": str(folder / name),
        "tokenizer": str(build_tokenizer(folder / "tokenizer")),
        "sources": [{"files": files}],
        "dedup": {"exact": True},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def kill_one(cluster: Cluster, words: str, begun: Callable[[], bool]) -> None:
    """Kill -9 the processes of a cluster whose command line has `words`, as soon as the work has `begun`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [pid for node in cluster.nodes for pid in cluster.processes(node, words)] if begun() else []
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if found:
            return
        time.sleep(0.005)
    raise AssertionError(f"{words!r} did not begin")


def test_an_array_and_its_joining_job_make_the_bytes_of_one_process_though_a_task_is_killed(
    cluster: Cluster, submit: Callable[..., list[str]], tmp_path: Path
) -> None:
    single = cluster.call(sys.executable, "-m", "megatron_cpt", "preprocess", str(write_corpus(tmp_path, "single")))
    assert single.returncode == 0, single.stderr
    array, join = submit(str(write_corpus(tmp_path, "joined")), "--tasks", str(TASKS))
    last = TASKS - 1  # the task that bears the id of the array
    kill_one(cluster, f"--shard {last}/{TASKS}", lambda: any(staging_path(str(tmp_path / "joined")).glob("*.part")))
    assert cluster.exit_code(join) == 0
    restarts = [cluster.job_field(f"{array}_{task}", "Restarts") for task in range(TASKS)]
    assert restarts == ["0", "0", "1"], "\n".join(path.read_text() for path in tmp_path.rglob("*.log"))
    for ending in (".bin", ".idx"):
        single_bytes = (tmp_path / f"single{ending}").read_bytes()
        assert len(single_bytes) > 100_000 and (tmp_path / f"joined{ending}").read_bytes() == single_bytes


def test_a_killed_conversion_starts_again_and_ends_with_the_bytes_of_an_undisturbed_one(
    cluster: Cluster, submit: Callable[..., list[str]], tmp_path: Path
) -> None:
    model, to = write_model(tmp_path / "model", vocab_size=400_000), ("--to", "torch_dist")
    alone = cluster.call(sys.executable, "-m", "megatron_cpt", "convert", str(model), str(tmp_path / "alone"), *to)
    assert alone.returncode == 0, alone.stderr
    (job,) = submit("convert", str(model), str(tmp_path / "made"), *to)
    kill_one(cluster, "megatron-cpt convert", (tmp_path / "made.partial").exists)
    assert cluster.exit_code(job) == 0
    assert cluster.job_field(job, "Restarts") == "1"
    made = hashes(tmp_path / "made")
    assert made == hashes(tmp_path / "alone") and sum(name.endswith(".distcp") for name in made) >= 1


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the receipt, which holds the time and the path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "conversion.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
