"""Step time lost to a save, synchronous and asynchronous, and the parts of a cold and a resumed start.

    python benchmarks/checkpointing.py MODEL_DIR DATA_PREFIX [--ranks 2] [--steps 18] [--save-every 6]

Runs `megatron-cpt train` on the model three times (no saves, synchronous, asynchronous saves), then continues the last
run. What a save costs is the wall time of the run's steps beyond that of the run without saves, per save. The three
runs are interleaved in no way, so on a shared machine repeat it and read the ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.train.checkpoint_folder import complete_checkpoints
from megatron_cpt.train.metrics import read_metrics

NEVER = "1000000 iters"


def train(
    folder: Path, name: str, arguments: argparse.Namespace, steps: int, save_every: str, asynchronous: bool
) -> Path:
    """Run `steps` steps; returns the run folder."""
    config = {
        "job_name": name,
        "run_dir": str(folder / name),
        "model": {"init_from": str(arguments.model), "allow_instruct": True, "check_start": False},
        "budget": {"train_tokens": 512 * steps, "warmup_tokens": 0},
        "batch": {"seq_length": 256, "global_batch_size": 2},
        "schedule": {"kind": "constant"},
        "parallel": {"gpus_per_node": arguments.ranks, "pp": arguments.ranks},
        "data": {"train": [{"name": "data", "prefix": str(arguments.data)}], "max_epochs": 1e9},
        "checkpoint": {"save_every": save_every, "async_save": asynchronous, "keep_last": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "megatron_cpt", "train", str(path)], check=True)
    return folder / name


def step_times(run: Path) -> list[float]:
    """Wall seconds from one step's row to the next, saves included; the first two steps are warm-up."""
    times = [row["time"] for row in read_metrics(run / "metrics.jsonl") if "event" not in row]
    return [after - before for before, after in itertools.pairwise(times[1:])]


def setup_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == "start"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--save-every", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = f"{arguments.save_every} iters"
        runs = {
            "no saves": train(folder, "none", arguments, arguments.steps, NEVER, True),
            "synchronous": train(folder, "sync", arguments, arguments.steps, every, False),
            "asynchronous": train(folder, "async", arguments, arguments.steps, every, True),
        }
        usual = statistics.median(step_times(runs["no saves"]))
        # The last save is the run's end and lies behind the last row.
        saves = (arguments.steps - 1) // arguments.save_every
        lost = {kind: (sum(step_times(run)) - usual * len(step_times(run))) / saves for kind, run in runs.items()}
        size = complete_checkpoints(runs["asynchronous"] / "checkpoints")[0][1].total_bytes
        print(f"checkpoint {size / 2**30:.2f} GiB, usual step {usual:.2f} s")
        for kind in ("synchronous", "asynchronous"):
            print(f"{kind:<13} {lost[kind]:6.2f} s lost per save")
        print(f"asynchronous / synchronous: {lost['asynchronous'] / lost['synchronous']:.1%}")
        rows = read_metrics(runs["no saves"] / "metrics.jsonl")
        steps = [row for row in rows if "event" not in row][2:]
        share = sum(row["data_seconds"] for row in steps) / sum(row["step_seconds"] for row in steps)
        print(f"data loading: {share:.3%} of a step")
        resumed = train(folder, "async", arguments, arguments.steps + 2, every, True)
        for kind, start in zip(("cold", "resumed"), (setup_of(resumed)[0], setup_of(resumed)[-1]), strict=True):
            first = next(row for row in read_metrics(resumed / "metrics.jsonl") if row["time"] > start["time"])
            parts = "  ".join(f"{part} {seconds:.1f}" for part, seconds in start["setup_seconds"].items())
            print(f"{kind} start: {parts}; first step or validation {first['time'] - start['time']:.1f} s later")


if __name__ == "__main__":
    main()
