"""`make test-gpu`: one GPU against the CPU path, in one command and one table. Offline; under eight minutes on an H100.

    python tests/gpu/run.py [--folder DIR] [--rehearse] [--no-benchmark]

1. Parity: the rows of `rows.py`, trained on the GPU and compared with the CPU; logits against transformers.
2. Checkpoints: written on the CPU and continued on the GPU, the reverse, and GPU to GPU.
3. `benchmarks/train_step.py --device cuda`: Qwen2-1.5B and 7B shapes at 4,096 tokens.

Without CUDA it is skipped with the reason and exit code 0. `--rehearse` runs parts 1 and 2 on a CPU nevertheless, which
proves everything but the kernels. The table is printed, and written to DIR/table.md with all figures in DIR/*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.gpu.rows import LOGITS, ROWS, GpuRow
from tests.matrix.checkpoints import LOSS_BOUND

REPO = Path(__file__).resolve().parents[2]
CHECKPOINT_BOUND = 1e-4  # absolute loss of the second half, between two devices; within one: LOSS_BOUND
BENCHMARK_LOG = "train_step.log"
Line = tuple[str, str, bool]  # what, seen, whether it is as it must be


def differences(measured: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """(largest absolute difference of the loss, largest relative difference of the gradient norm) over all steps."""
    loss = max(abs(a - b) for a, b in zip(measured["loss"], expected["loss"], strict=True))
    norm = max(abs(a - b) / b for a, b in zip(measured["grad_norm"], expected["grad_norm"], strict=True))
    return loss, norm


def judge(row: GpuRow, results: dict[str, Any], baselines: dict[str, Any]) -> Line:
    """Compare a row with its baseline: within its bounds, or beyond ten times them after a mistake on purpose."""
    measured, expected = results[row.name], baselines[row.row.baseline or row.row.model]
    if "refused" in measured:
        return row.name, f"refused: {measured['refused']}", True
    if "error" in measured or "error" in expected:
        return row.name, str(measured.get("error", expected.get("error"))), False
    loss, norm = differences(measured, expected)
    within = loss <= row.bounds[0] and norm <= row.bounds[1]
    beyond = loss > 10 * row.bounds[0] and norm > 10 * row.bounds[1]
    tokens_agree = measured["tokens"] == expected["tokens"]
    right = beyond if row.row.sabotage else within and tokens_agree
    return (
        row.name,
        f"loss {loss:.1e}, gradient norm {norm:.1e} (bounds {row.bounds[0]:.0e}, {row.bounds[1]:.0e})",
        right,
    )


def run_parity(folder: Path) -> list[Line]:
    models = folder / "models"
    _command([str(REPO / "tests" / "gpu" / "models.py"), str(models)], "cpu", folder / "models.log")
    results = {}
    for device in ("cpu", "cuda"):
        out = folder / f"parity-{device}.json"
        worker = [str(REPO / "tests" / "gpu" / "worker.py"), device, str(models), str(out)]
        if problem := _command(worker, device, folder / f"parity-{device}.log"):
            return [(f"parity on {device}", problem, False)]
        results[device] = json.loads(out.read_text())
    lines = [judge(row, results["cuda"], results["cpu"]) for row in ROWS]
    for row in LOGITS:
        difference = results["cuda"][row.name]["difference"]
        lines.append((row.name, f"{difference:.1e} (bound {row.bound:.0e})", difference <= row.bound))
    return lines


def run_checkpoints(folder: Path) -> list[Line]:
    place, script = folder / "checkpoints", str(REPO / "tests" / "matrix" / "checkpoints.py")
    place.mkdir(exist_ok=True)
    lines: list[Line] = []
    for device in ("cpu", "cuda"):
        log = folder / f"checkpoints-{device}.log"
        if problem := _command([script, str(place), device, "--ranks", "1"], device, log, place / f"{device}.json"):
            return [(f"checkpoint written on {device}", problem, False)]
    for reader, writers in (("cuda", ("cpu", "cuda")), ("cpu", ("cuda",))):
        out, log = place / f"read-{reader}.json", folder / f"checkpoints-read-{reader}.log"
        if problem := _command([script, str(place), reader, "--ranks", "1", "--read", *writers], reader, log, out):
            lines.append((f"checkpoints read on {reader}", problem, False))
            continue
        for writer, seen in json.loads(out.read_text().splitlines()[-1]).items():
            what, bound = f"checkpoint {writer} -> {reader}", LOSS_BOUND if writer == reader else CHECKPOINT_BOUND
            if "error" in seen:
                lines.append((what, seen["error"], False))
            else:
                right = seen["difference"] <= bound
                lines.append((what, f"loss of the second half {seen['difference']:.1e} (bound {bound:.0e})", right))
    return lines


def run_benchmark(folder: Path) -> list[Line]:
    log = folder / BENCHMARK_LOG
    problem = _command([str(REPO / "benchmarks" / "train_step.py"), "--device", "cuda", "--repeats", "3"], "cuda", log)
    return [("benchmarks/train_step.py --device cuda", problem or f"see {log}", problem is None)]


def benchmark_tables(log: Path) -> str:
    """The tables that the benchmark printed, if it ran."""
    printed = log.read_text().splitlines() if log.is_file() else []
    first = next((at for at, line in enumerate(printed) if line.startswith("|")), len(printed))
    return "".join(f"\n{line}" for line in ["", *printed[first:]] if not line or line.startswith("|"))


def _command(arguments: list[str], device: str, log: Path, out: Path | None = None) -> str | None:
    """Run a script of ours on a device; standard output goes to `out`. Return why it failed, None when it did not."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        command = [sys.executable, "-W", "ignore", *arguments]
        sink = subprocess.PIPE if out is not None else stream
        done = subprocess.run(command, cwd=REPO, env=environment, stdout=sink, stderr=stream, text=True, check=False)
    if out is not None:
        out.write_text(done.stdout)
    code = done.returncode
    return None if code == 0 else f"exit code {code}, see {log}"


def device_name() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return "no GPU: a rehearsal on the CPU"


def table(lines: list[Line], seconds: float) -> str:
    from megatron_cpt.launch.engine import check_engine

    head = f"{device_name()}; Python {platform.python_version()}, torch {torch.__version__}, {check_engine()}"
    rows = [f"| {what} | {seen} | {'ok' if right else '**FAILED**'} |" for what, seen, right in lines]
    return "\n".join([head, f"{seconds:.0f} s", "", "| row | seen | |", "|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPO / ".gpu")
    parser.add_argument("--rehearse", action="store_true", help="without CUDA: parts 1 and 2 on the CPU")
    parser.add_argument("--no-benchmark", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.rehearse:
        built = "is a build without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        print(f"skipped: torch {torch.__version__} {built}; --rehearse runs what a CPU can")
        return 0
    folder: Path = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    lines = run_parity(folder) + run_checkpoints(folder)
    if torch.cuda.is_available() and not asked.no_benchmark:
        lines += run_benchmark(folder)
    text = table(lines, time.monotonic() - begin) + benchmark_tables(folder / BENCHMARK_LOG)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    return 0 if all(right for _, _, right in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
