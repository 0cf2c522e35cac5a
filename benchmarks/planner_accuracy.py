"""How far the planner's speed is off on published measurements that it was not fitted to.

    python benchmarks/planner_accuracy.py [--rows FILE.csv] [--fit]

The rows are facts of public sources, each named in its column `source` (benchmarks/planner/published_layouts.csv, or a
file of the same columns). What the model does not describe is left out by the rules of `out_of_scope`, and counted.
Each source is predicted with constants fitted to the others; then whole repositories are left out, so that a new
version of the same page cannot help. The peer is a constant share of the peak per number format, fitted alike. `--fit`
prints the constants of all rows together, which stand in megatron_cpt/planner/hardware.yaml.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_cpt.budget import parse_count
from megatron_cpt.planner.hardware import Hardware, find_hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.throughput import Shape, number_format, throughput

ROWS = Path(__file__).parent / "planner" / "published_layouts.csv"
# Constants of one kind of GPU: where the search begins, and between what it looks.
BOUNDS = {
    "bf16": (0.5, 0.95),
    "fp8": (0.35, 0.95),
    "attention": (0.25, 0.75),
    "hbm": (0.4, 0.95),
    "overlap": (0.0, 0.9),
}
START = {"bf16": 0.72, "fp8": 0.56, "attention": 0.45, "hbm": 0.6, "overlap": 0.5}
LINK = 0.75  # of a link's bandwidth; the fit cannot tell it from the overlap
SWEEP_NETWORK = 6.25e9  # bytes/s per GPU: its nodes share four 100 Gb/s links among eight GPUs (arXiv:2211.05100)
OUTLIER = 0.3  # an error beyond this counts no more in the fit

Row = dict[str, str]
Constants = dict[str, float]


@dataclass(frozen=True)
class Point:
    """A measured row as the planner sees it."""

    row: Row
    shape: Shape
    layout: Layout
    gpu: str
    tokens_per_s_per_gpu: float

    @property
    def source(self) -> str:
        return self.row["source"]

    @property
    def repository(self) -> str:
        return self.source.split(" ")[0]


def out_of_scope(row: Row) -> str | None:
    """Why the model does not describe a row, None where it does."""
    if row["EP"] not in ("", "1"):
        return "mixture of experts"
    if row["source"].startswith("mosaicml/") or "FSDP" in row["notes"]:
        return "fully sharded weights, not Megatron-Core's parallelism"
    if row["source"].startswith(("calculon-ai/", "bigscience-workshop/")):
        return "another program, or computed; the sweeps below use its order only"
    if not row["gpu"].startswith("H100"):
        return "not an H100: of one kind of software, or of number formats that the planner does not know"
    if row["precision"].lower().startswith(("mxfp", "nvfp")):
        return "number formats that the planner does not know"
    if _is_tuning(row):
        return "fine-tuning: packed samples, or adapters"
    if not row["tokens_per_s_per_gpu"] and not row["tflops_per_gpu"]:
        return "no speed"
    return None


def _is_tuning(row: Row) -> bool:
    """The tables of NeMo and Megatron-Bridge list fine-tuning beside pre-training; its global batch is 32."""
    of_nvidia = row["source"].startswith(("NVIDIA/NeMo ", "NVIDIA-NeMo/Megatron-Bridge docs"))
    return of_nvidia and row["GBS"] == "32" and row["model"].upper().startswith("LLAMA")


def point(row: Row) -> Point:
    """A row of the csv; what it leaves open is the plain choice: a micro-batch of one sample, no virtual stages."""

    def number(name: str, default: int = 1) -> int:
        return parse_count(row[name]) if row[name] else default

    hidden, heads, layers = number("hidden"), number("heads", 112), number("layers")
    tp, pp, cp, gpus = number("TP"), number("PP"), number("CP"), number("gpus")
    dp, size, seq = gpus // (tp * pp * cp), number("MBS"), number("seq")
    shape = Shape(
        layers, hidden, number("ffn", 4 * hidden), heads, number("kv_heads", heads),
        128 if row["model"].startswith("Qwen3") else hidden // heads, number("vocab", 250_000),
        gated=row["model"].lower().startswith(("llama", "qwen")),
    )  # fmt: skip
    layout = Layout(
        tp=tp, pp=pp, vpp=number("VPP", 0) or None, cp=cp, dp=dp, gpus_per_node=8, micro_batch_size=size,
        micro_batches=max(1, number("GBS") // (size * dp)), seq_length=seq,
        layers_per_stage=tuple(layers // pp + (stage < layers % pp) for stage in range(pp)),
        sequence_parallel=tp > 1, recompute="full" if row["recompute"] == "full" else "none",
        overlap_grad_reduce=True, overlap_param_gather=True, overlap_tensor_parallel=True,
        fp8=row["precision"].lower().startswith("fp8"),
    )  # fmt: skip
    return Point(row, shape, layout, "h100-80g", _measured(row, shape, layout))


def _measured(row: Row, shape: Shape, layout: Layout) -> float:
    if row["tokens_per_s_per_gpu"]:
        return float(row["tokens_per_s_per_gpu"])
    # Megatron-LM's own count of operations: attention over the whole square.
    attention = 4 * layout.seq_length * shape.num_attention_heads * shape.head_dim
    per_token = 3 * (shape.num_layers * (2 * shape.layer_weights + attention) + 2 * shape.head_weights)
    return 1e12 * float(row["tflops_per_gpu"]) / per_token


def hardware_with(gpu: str, constants: Constants) -> Hardware:
    known = find_hardware(gpu)
    return replace(known, efficiency={**known.efficiency, **constants, "link": LINK})


def log_error(point: Point, constants: Constants) -> float:
    predicted = throughput(point.shape, point.layout, hardware_with(point.gpu, constants)).tokens_per_s_per_gpu
    return math.log(predicted / point.tokens_per_s_per_gpu)


def constant_mfu_error(point: Point, constants: Constants) -> float:
    """The peer: the same share of the peak for every layout."""
    gpu = find_hardware(point.gpu)
    precision = number_format(point.layout, gpu)
    per_token = point.shape.flops_per_token(point.layout.seq_length)
    return math.log(constants[precision] * gpu.peak_flops[precision] / per_token / point.tokens_per_s_per_gpu)


def fit(points: Sequence[Point], error: Callable[[Point, Constants], float], names: Iterable[str]) -> Constants:
    """The constants of least mean absolute log error, each source, model and format weighing the same.

    One constant after the other, over a grid that grows finer: the same rows give the same constants.
    """
    counts = Counter(_kind(point) for point in points)

    def cost(constants: Constants) -> float:
        return sum(min(abs(error(point, constants)), OUTLIER) / counts[_kind(point)] for point in points)

    best = dict(START)
    lowest = cost(best)
    for width in (0.15, 0.07, 0.03, 0.015):
        for _ in range(2):
            for name in names:
                low, high = BOUNDS[name]
                for step in (-2, -1, 1, 2):
                    tried = best | {name: min(high, max(low, best[name] + step * width))}
                    if (found := cost(tried)) < lowest:
                        best, lowest = tried, found
    return best


def _kind(point: Point) -> tuple[str, str, str]:
    return point.source, point.row["model"], point.row["precision"]


def leave_one_out(
    points: Sequence[Point],
    key: Callable[[Point], str],
    error: Callable[[Point, Constants], float],
    names: Sequence[str],
) -> dict[str, list[float]]:
    """Errors of each group, predicted by constants that were fitted without it."""
    errors = {}
    for group in sorted({key(point) for point in points}):
        constants = fit([point for point in points if key(point) != group], error, names)
        errors[group] = [math.expm1(error(point, constants)) for point in points if key(point) == group]
    return errors


def summary(errors: Iterable[float]) -> tuple[int, float, float]:
    """Number, median and nine-tenths quantile of the absolute errors."""
    found = sorted(abs(error) for error in errors)
    return len(found), statistics.median(found), found[math.ceil(0.9 * len(found)) - 1]


def sweeps(rows: Sequence[Row], constants: Constants) -> list[tuple[str, int, float, float]]:
    """Layouts of one model on the same GPUs: spread of the errors once each sweep's mean is taken away, and the peer's.

    Measured by another program on A100, with full recomputation: what is judged is the order, not the speed.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["source"].startswith("bigscience-workshop/") and row["tflops_per_gpu"] and row["hidden"]:
            title = row["notes"].split(";")[0]
            shape = (row["model"], row["layers"], row["hidden"], row["heads"])  # one name may stand for two shapes
            groups[title, row["gpus"], row["precision"], *shape].append(row)
    found = []
    for (title, _, _, model, *_), members in groups.items():
        if len({(row["TP"], row["PP"], row["MBS"]) for row in members}) < 4:
            continue
        logs = []
        for row in members:
            there = replace(
                point(row).layout, attention="unfused", overlap_grad_reduce=False, overlap_param_gather=False,
                overlap_tensor_parallel=False, sequence_parallel=False,
            )  # fmt: skip
            machine = replace(hardware_with("a100-80g", constants), network_bytes_per_s=SWEEP_NETWORK)
            speed = throughput(point(row).shape, there, machine)
            logs.append((math.log(speed.tokens_per_s_per_gpu), math.log(float(row["tflops_per_gpu"]))))
        ours = _spread([predicted - measured for predicted, measured in logs])
        found.append((f"{title}, {model}", len(members), ours, _spread([-measured for _, measured in logs])))
    return found


def _spread(logs: Sequence[float]) -> float:
    middle = statistics.median(logs)
    return statistics.mean(abs(math.expm1(value - middle)) for value in logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--fit", action="store_true", help="print the constants of all rows together")
    arguments = parser.parse_args()
    with arguments.rows.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reasons = Counter(out_of_scope(row) for row in rows)
    points = [point(row) for row in rows if out_of_scope(row) is None]
    print(f"{len(rows)} rows, {len(points)} of them of what the planner plans. Left out:")
    for reason, count in reasons.most_common():
        if reason is not None:
            print(f"  {count:>4}  {reason}")
    if arguments.fit:
        print("constants of all rows:", {name: round(v, 3) for name, v in fit(points, log_error, BOUNDS).items()})
        return
    print("\n| left out | rows | median error | p90 | constant share: median | p90 |\n|---|---|---|---|---|---|")
    for title, key in (("one source", lambda p: p.source), ("one repository", lambda p: p.repository)):
        ours = leave_one_out(points, key, log_error, list(BOUNDS))
        peer = leave_one_out(points, key, constant_mfu_error, ["bf16", "fp8"])
        if title == "one repository":
            for group, errors in ours.items():
                _print_line(group, errors, peer[group])
        _print_line(
            f"**each time {title}**", [e for errors in ours.values() for e in errors],
            [e for errors in peer.values() for e in errors],
        )  # fmt: skip
    print("\n| sweep of layouts | rows | spread of the error | of a constant share |\n|---|---|---|---|")
    for title, count, ours_spread, peer_spread in sweeps(rows, fit(points, log_error, BOUNDS)):
        print(f"| {title} | {count} | {ours_spread:.1%} | {peer_spread:.1%} |")


def _print_line(title: str, ours: Sequence[float], peer: Sequence[float]) -> None:
    count, median, most = summary(ours)
    _, peer_median, peer_most = summary(peer)
    print(f"| {title} | {count} | {median:.1%} | {most:.1%} | {peer_median:.1%} | {peer_most:.1%} |")


if __name__ == "__main__":
    main()
