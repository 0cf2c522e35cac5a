"""Checkpoints across versions of Megatron-Core: every cell writes one, and every cell continues everyone's.

Data-parallel ranks (two by default) with the distributed optimizer train STEPS steps and save half way. A reader starts
from the half-way checkpoint of the writer, and its losses of the second half must be those of the writer. It also
converts the checkpoint to Hugging Face, and all conversions of one checkpoint must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tests.configs import write_tiny_run  # noqa: E402
from tests.synthetic_data import random_documents, write_dataset  # noqa: E402
from tests.synthetic_model import write_model  # noqa: E402

STEPS, TOKENS_PER_STEP = 8, 8 * 64
LOSS_BOUND = 1e-6  # absolute, fp32; the bound of the parity table


def write(folder: Path, ranks: int) -> dict[str, Any]:
    """Train STEPS steps in `folder` with this interpreter. Return the losses by step."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(folder / "model")
    write_dataset(folder / "data", random_documents(200, 128, 1))
    losses = _train(_config(folder, ranks))
    for path in (folder / "run" / "checkpoints").glob(f"iter_*{STEPS}"):
        shutil.rmtree(path)  # a reader continues from the half-way checkpoint
    return {"losses": losses}


def read(folder: Path, work: Path, written: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Continue what another version wrote in `folder`. Return what was found, `error` where it failed."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    try:
        losses = _train(_config(work, ranks))
        if (began := _last_start(work)) != STEPS // 2:
            raise RuntimeError(f"it began at step {began} instead of continuing at {STEPS // 2}")
        half = {step: loss for step, loss in written["losses"].items() if int(step) > STEPS // 2}
        if not half or losses.keys() != written["losses"].keys():
            raise RuntimeError(f"steps {sorted(losses)} were trained, {sorted(written['losses'])} were expected")
        difference = max(abs(losses[step] - loss) for step, loss in half.items())
        return {"difference": difference, "hf_sha256": _convert(work)}
    except RuntimeError as error:
        return {"error": str(error)}


def _config(folder: Path, ranks: int) -> Path:
    return write_tiny_run(
        folder,
        model={"attention": "sdpa"},  # where TransformerEngine is there, it would compute in TF32
        optimizer={"lr": 2e-3},  # so that a lost moment would show
        budget={"train_tokens": STEPS * TOKENS_PER_STEP, "warmup_tokens": 0},
        parallel={"gpus_per_node": ranks},
        checkpoint={"save_every": f"{STEPS // 2} iters"},
        seed=7,
    )


def _last_start(folder: Path) -> int:
    """The step after which the last start of the run in `folder` went on."""
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return int([row["iteration"] for row in rows if row.get("event") == "start"][-1])


def _train(config: Path) -> dict[str, float]:
    _command("train", str(config), "--accept-changes")
    rows = map(json.loads, (config.parent / "run" / "metrics.jsonl").read_text().splitlines())
    return {str(row["iteration"]): row["loss"] for row in rows if row.get("event", "step") == "step" and "loss" in row}


def _convert(work: Path) -> str:
    first = next((work / "run" / "checkpoints").glob(f"iter_*{STEPS // 2}"))
    _command("convert", str(first), str(work / "hf"), "--to", "hf")
    return hashlib.sha256((work / "hf" / "model.safetensors").read_bytes()).hexdigest()


def _command(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_cpt", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {done.returncode}: {done.stderr[-600:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="one folder per writer lies in it")
    parser.add_argument("name", help="of this cell")
    parser.add_argument("--read", nargs="*", default=None, metavar="WRITER", help="continue these instead of writing")
    parser.add_argument("--ranks", type=int, default=2)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    if asked.read is None:
        results = write(asked.folder / asked.name, asked.ranks)
    for writer in asked.read or ():
        told = json.loads((asked.folder / f"{writer}.json").read_text())
        results[writer] = read(asked.folder / writer, asked.folder / "readers" / asked.name, told, asked.ranks)
    print(json.dumps(results))
