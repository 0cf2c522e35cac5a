"""One launch of the worker per number of ranks, shared by all rows of the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RESULTS = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face directories, one per name in `tiny_models.MODELS`."""
    from tests.parity.tiny_models import MODELS, save_tiny_model

    folder = tmp_path_factory.mktemp("tiny_models")
    for name in MODELS:
        save_tiny_model(name, folder)
    return folder


@pytest.fixture(scope="session")
def parity_results(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> RESULTS:
    """results(ranks) -> {row name: what it measured}; the launch happens on first use."""
    cache: dict[int, dict[str, Any]] = {}

    def results(ranks: int) -> dict[str, Any]:
        if ranks not in cache:
            cache[ranks] = launch(ranks, tiny_models, tmp_path_factory.mktemp(f"ranks{ranks}"))
        return cache[ranks]

    return results


def launch(ranks: int, models_dir: Path, folder: Path, worker: str = "worker.py") -> dict[str, Any]:
    out, log = folder / "results.json", folder / "log.txt"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(HERE / worker), str(ranks), str(models_dir), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    with log.open("w") as stream:
        code = subprocess.run(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=900, check=False
        ).returncode
    assert code == 0, f"the worker on {ranks} ranks failed:\n{log.read_text()[-6000:]}"
    return json.loads(out.read_text())
