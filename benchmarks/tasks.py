"""lm-eval's own `hf` model on an export against our adapter on the checkpoint it was made of: the same items, one run.

    python benchmarks/tasks.py CHECKPOINT EXPORT TASK.yaml [TASK.yaml ...] [--limit 100] [--rounds 2]

Each side is a process of its own with the same number of threads, from its first import to its last result; the two
take turns, and the smaller time of each counts. lm-eval's model is given the batch size of `--batch-sizes` at which it
is fastest. Prints Markdown: wall and CPU seconds with their ratios, and the accuracies.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("tasks", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--side", help=argparse.SUPPRESS)  # of a process of this script: ours or a batch size
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        told = _ours(options) if options.side == "ours" else _theirs(options, int(options.side))
        options.out.write_text(json.dumps(told))
        return
    sides = ["ours", *map(str, options.batch_sizes)]
    best: dict[str, tuple[float, float]] = {}
    answers: dict[str, Any] = {}
    for _ in range(options.rounds):
        for side in sides:
            measured, answers[side] = _measured(side, options)
            best[side] = min(best.get(side, measured), measured)
            print(f"{side}: {measured[0]:.1f} s, {measured[1]:.1f} CPU s", file=sys.stderr, flush=True)
    _show(best, answers, sides)


def _measured(side: str, options: argparse.Namespace) -> tuple[tuple[float, float], Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, *map(str, [options.checkpoint, options.export, *options.tasks])]
        command += ["--limit", str(options.limit), "--dtype", options.dtype, "--side", side, "--out", str(out)]
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env={"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **os.environ})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return (time.monotonic() - started, cpu), json.loads(out.read_text())


def _theirs(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megatron_cpt.eval.task_files import read_task_file

    told = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(options.export),
            "dtype": options.dtype,
            "max_length": LENGTH,
            "softmax_dtype": "float32",
        },
        tasks=[read_task_file(path) for path in options.tasks],
        task_manager=TaskManager(include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        limit=options.limit,
        bootstrap_iters=0,
    )
    assert told is not None, "this is the only rank"
    return {name: row["acc,none"] for name, row in told["results"].items()}


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval import task_run

    found = open_checkpoint(options.checkpoint)
    results = task_run.measure_tasks(
        task_run.TaskRequest(
            model=str(options.checkpoint),
            base=None,
            tasks=tuple(map(str, options.tasks)),
            engine="hf" if found.format == "hf" else "megatron",
            dtype=options.dtype,
            seq_length=LENGTH,
            limit=options.limit,
            offline=True,
        )
    )
    assert results is not None, "this is the only rank"
    return {row.task: row.after.value for row in results.rows if row.metric == "acc"}


def _show(best: dict[str, tuple[float, float]], answers: dict[str, Any], sides: list[str]) -> None:
    print("| | wall s | CPU s | wall, ours / theirs | CPU, ours / theirs | accuracies |\n|---|---|---|---|---|---|")
    for side in sides:
        wall, cpu = best[side]
        name = "our adapter on the checkpoint" if side == "ours" else f"lm-eval's hf on the export, batch {side}"
        ratios = [f"{ours / other:.2f}" for ours, other in zip(best["ours"], best[side], strict=True)]
        accuracies = ", ".join(f"{task} {value:.3f}" for task, value in answers[side].items())
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {' | '.join(ratios)} | {accuracies} |")


if __name__ == "__main__":
    main()
