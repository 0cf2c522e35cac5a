"""How much memory a training step takes at its peak, against transformers, and what of it has a name.

    python benchmarks/train_memory.py [--sizes small,medium,smollm2-135m]

The models, the tokens and the peer are those of train_step.py; each side runs in a process of its own, three steps. The
peak is the resident memory of the whole process during the last step (Linux: VmHWM, reset before it). transformers
trains bf16 parameters with bf16 gradients and moments; this trainer keeps fp32 sums, master weights and moments, which
is 10 bytes per parameter more: the last column is the ratio without that difference of precision.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_step import (
    ON_CPU,
    Step,
    megatron_step,
    microbatches,
    run_config,
    table,
    transformers_step,
    write_model,
)
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
from megatron_cpt.train.state import build_train_state

SIDES = ("megatron", "transformers")
# Bytes per parameter. Ours: bf16 weights, fp32 gradient sums, fp32 master weights, two fp32 moments.
OURS = {"weights": 2, "gradient sums": 4, "master weights": 4, "moments": 8}
THEIRS_BYTES = 2 + 2 + 4  # weights, gradients and two moments, all bf16


def resident_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def peak_of_last_step(step: Step) -> float:
    """MiB of this process at the peak of the third step."""
    for _ in range(2):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    step()
    return resident_mib("VmHWM")


def one_side(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model_dir = Path(args.model_dir)
    arch, before = read_architecture(model_dir), resident_mib("VmRSS")
    batches = microbatches(arch.vocab_size, args)
    if args.side == "megatron":
        config = run_config(model_dir, args)
        init_runtime(config)
        peak = peak_of_last_step(megatron_step(build_train_state(config, arch), batches))
        shutdown_runtime()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
        peak = peak_of_last_step(transformers_step(model, batches, torch.device("cpu")))
    print(json.dumps({"peak": peak, "imports": before, "parameters": arch.num_parameters}))


def both_sides(size: str, folder: Path, args: argparse.Namespace) -> list[str]:
    model_dir = write_model(size, folder)
    seen: dict[str, Any] = {}
    for side in SIDES:
        command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--model-dir", str(model_dir)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        seen[side] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (seen[side]["peak"] for side in SIDES)
    mib = {name: bytes_ * seen["megatron"]["parameters"] / 2**20 for name, bytes_ in OURS.items()}
    rest = ours - sum(mib.values()) - seen["megatron"]["imports"]
    precision = sum(mib.values()) - THEIRS_BYTES * seen["megatron"]["parameters"] / 2**20
    row = [size, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", *(f"{one:.0f}" for one in mib.values())]
    return [*row, f"{seen['megatron']['imports']:.0f}", f"{rest:.0f}", f"{(ours - precision) / theirs:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=ON_CPU)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--attention", default="auto", choices=("auto", "sdpa", "block_causal", "unfused"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    if args.side:
        one_side(args)
        return
    head = ["MiB at the peak of a step", "ours", "transformers", "ratio", *OURS, "imports", "the rest"]
    with tempfile.TemporaryDirectory() as folder:
        rows = [both_sides(size, Path(folder), args) for size in args.sizes.split(",")]
    print(table([*head, "ratio, precision aside"], rows))


if __name__ == "__main__":
    main()
