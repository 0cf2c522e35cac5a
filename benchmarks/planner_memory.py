"""Predicted against measured memory of a training step: every rank of ten layouts on this CPU, or one GPU.

    python benchmarks/planner_memory.py [--cases 0,3] [--seq-length 1024]
    python benchmarks/planner_memory.py --device cuda           # shapes of Qwen2 and Llama, sequences of 4,096 and more

Each case trains three steps. Predicted are the planner's formulas, and the live bytes of the dry run; neither is fitted
to it.

On a CPU a case has real ranks over gloo, one thread each. Measured is by how much a rank's resident memory grows from
the moment before its model is built, when another has been built and trained in the process, to the peak of the last
step (Linux: VmHWM, reset before it), with an allocator that keeps no freed blocks. The model is such that weights,
optimizer, activations and logits all matter.

On a GPU it is the peak of what torch has allocated in the last step. What it has reserved beyond that, and what the
device holds beyond what is reserved, are the overheads that the planner adds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.launch.local import free_port
from megatron_cpt.planner.hardware import find_hardware, known_hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import memory_of_stages
from megatron_cpt.planner.throughput import Shape, throughput

MIB = 2**20
Facts = dict[str, Any]  # of config.json
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "use_sliding_window": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "max_position_embeddings": 32768,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in the words of config.json, and what a run's config says beyond the defaults."""

    name: str
    facts: Facts
    sections: dict[str, Any] = field(default_factory=dict)
    seq_length: int | None = None  # --seq-length where it is None


def _facts(base: Facts, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, **more: Any) -> Facts:
    return base | {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocab, "tie_word_embeddings": False, **more,
    }  # fmt: skip


SMALL = _facts(QWEN2, 8, 768, 2304, 12, 4, 16384)
QWEN2_05B = _facts(QWEN2, 24, 896, 4864, 14, 2, 151936, tie_word_embeddings=True)
QWEN2_15B = _facts(QWEN2, 28, 1536, 8960, 12, 2, 151936, tie_word_embeddings=True)
QWEN2_7B_CUT = _facts(QWEN2, 6, 3584, 18944, 28, 4, 152064)
LLAMA3_8B_CUT = _facts(LLAMA, 8, 4096, 14336, 32, 8, 128256)
FULL, MLP = {"granularity": "full"}, {"granularity": "selective", "modules": ["mlp"]}
ON_CPU = (
    Case("1 rank", SMALL),
    Case("1 rank, 4 samples", SMALL, {"batch": {"micro_batch_size": 4}}),
    Case("1 rank, full recomputation", SMALL, {"recompute": FULL}),
    Case("1 rank, fp32", SMALL, {"precision": {"dtype": "fp32"}}),
    Case("TP 2", SMALL, {"parallel": {"tp": 2}}),
    Case("TP 2, no sequence parallelism", SMALL, {"parallel": {"tp": 2, "sequence_parallel": False}}),
    Case("PP 2", SMALL, {"parallel": {"pp": 2}}),
    Case("PP 2 x VPP 2", SMALL, {"parallel": {"pp": 2, "vpp": 2}}),
    Case("DP 2, distributed optimizer", SMALL, {"parallel": {"gpus_per_node": 2}}),
    Case("TP 2 x PP 2", SMALL, {"parallel": {"tp": 2, "pp": 2}}),
)
ON_GPU = (
    Case("Qwen2-0.5B, 4 samples", QWEN2_05B, {"batch": {"micro_batch_size": 4}}),
    Case("Qwen2-1.5B", QWEN2_15B),
    Case("Qwen2-1.5B, 2 samples", QWEN2_15B, {"batch": {"micro_batch_size": 2}}),
    Case("Qwen2-1.5B, MLP recomputed", QWEN2_15B, {"recompute": MLP}),
    Case("Qwen2-1.5B, all recomputed, 16K", QWEN2_15B, {"recompute": FULL}, 16384),
    Case("Qwen2-7B cut to 6 layers", QWEN2_7B_CUT),
    Case("Qwen2-7B cut to 6 layers, 2 samples, all recomputed", QWEN2_7B_CUT,
         {"recompute": FULL, "batch": {"micro_batch_size": 2}}),
    Case("Llama-3-8B cut to 8 layers", LLAMA3_8B_CUT),
    Case("Llama-3-8B cut to 8 layers, 8K", LLAMA3_8B_CUT, {}, 8192),
)  # fmt: skip


class Measured(NamedTuple):
    """What a rank held in its last step, in bytes."""

    stage: int
    live: int  # weights, gradients, optimizer and all that a step allocates
    reserved: int  # by torch from the GPU; `live` on a CPU
    on_device: int  # of the GPU, in all; `live` on a CPU
    tokens_per_s: float | None  # of a GPU


def run_config(case: Case, folder: Path, args: argparse.Namespace) -> RunConfig:
    parallel = case.sections.get("parallel", {})
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
    attention = "sdpa" if args.device == "cuda" else "block_causal"
    return build_config(
        {
            "job_name": "benchmark",
            "model": {"init_from": "random", "architecture": str(folder), "attention": attention},
            "batch": {
                "seq_length": case.seq_length or args.seq_length,
                "global_batch_size": 8,
                **case.sections.get("batch", {}),
            },
            "parallel": {"gpus_per_node": ranks, **parallel},
            "precision": {"dtype": "bf16", **case.sections.get("precision", {})},
            "recompute": case.sections.get("recompute", {}),
        }
    )


def one_rank(config: RunConfig, arch: Architecture) -> Measured:
    """Train three steps as a rank of a job, and measure the last."""
    import torch

    from benchmarks.train_step import megatron_step, microbatches  # adapts Megatron-Core before anything imports it
    from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
    from megatron_cpt.train.state import build_train_state

    torch.set_num_threads(1)
    runtime = init_runtime(config)
    batches = microbatches(arch.vocab_size, config.batch, config.parallel.data_parallel_size)

    def step_of(shape: Architecture) -> Callable[[], float]:
        return megatron_step(build_train_state(config, shape), batches)

    tokens_per_s = None
    if torch.cuda.is_available():
        live, reserved, on_device, seconds = held_on_gpu(step_of(arch))
        tokens_per_s = config.batch.global_batch_size * config.batch.seq_length / seconds
    else:
        live = reserved = on_device = grown_on_cpu(step_of, arch)
    stage = runtime.rank * config.parallel.pp // runtime.world_size
    shutdown_runtime()
    return Measured(stage, live, reserved, on_device, tokens_per_s)


def held_on_gpu(step: Callable[[], float]) -> tuple[int, int, int, float]:
    """Return bytes allocated, reserved and on the device at the peak of the third step, and its seconds."""
    import torch

    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    free, capacity = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), capacity - free, seconds


def grown_on_cpu(step_of: Callable[[Architecture], Callable[[], float]], arch: Architecture) -> int:
    """Return by how many bytes the process grows from before the model is built to the peak of its third step.

    A small model is trained first, so that everything that training imports and starts is there.
    """
    from benchmarks.train_memory import peak_of_last_step, resident_mib

    small = replace(arch, hidden_size=48, head_dim=48 // arch.num_attention_heads, ffn_hidden_size=48)
    step_of(small)()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_mib("VmRSS")
    return int((peak_of_last_step(step_of(arch)) - before) * MIB)


def counted(config: RunConfig, arch: Architecture, on_gpu: bool) -> list[int]:
    """Return the dry run's bytes of each stage, with the modules of this CPU or of a GPU."""
    from megatron_cpt.dry_run.fake_world import as_rank, prepare_process
    from megatron_cpt.dry_run.kernels import modules_of_a_gpu
    from megatron_cpt.dry_run.rank import build_rank, static_bytes
    from megatron_cpt.dry_run.schedule import run_step

    prepare_process()
    derived, found = derive(config, arch), []
    for stage in range(config.parallel.pp):
        with as_rank(config, stage * derived.world_size // config.parallel.pp):
            state = build_rank(config, arch, modules_of_a_gpu(config) if on_gpu else None)
            static = static_bytes(state, config.optimizer).total
            found.append(static + run_step(state, config, derived.gradient_accumulation_steps, on_gpu=on_gpu).peak)
    return found


def run_ranks(command: list[str], ranks: int) -> list[Measured]:
    """Start `ranks` processes of `command` and return what each measures."""
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # no freed blocks are kept
    jobs = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    said = [job.communicate()[0] for job in jobs]
    assert all(job.returncode == 0 for job in jobs), [job.returncode for job in jobs]
    return [Measured(*json.loads(text.splitlines()[-1])) for text in said]


def row(number: int, case: Case, args: argparse.Namespace) -> tuple[list[str], float, float]:
    """Return a line of the table, and how far both predictions are off for the rank that holds most."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(case.facts))
        config, arch = run_config(case, Path(name), args), read_architecture(Path(name))
        command = [sys.executable, "-W", "ignore", __file__, "--model-dir", name, "--device", args.device]
        command += ["--seq-length", str(args.seq_length), "--cases", str(number)]
        ranks = run_ranks([*command, "--part", "rank"], config.parallel.world_size)
        without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, "--part", "counted"], stdout=subprocess.PIPE, text=True, check=True, env=without_gpu
        )
    fullest = max(ranks, key=lambda rank: rank.live)
    live = json.loads(done.stdout.splitlines()[-1])[fullest.stage]
    plan = memory_of_stages(arch, Layout.of(config, arch))[fullest.stage]
    planned = plan.static + plan.live
    off = planned / fullest.live - 1, live / fullest.live - 1
    cells = [case.name, *(f"{size / MIB:,.0f}" for size in (fullest.live, planned, live))]
    cells += [f"{one:+.1%}" for one in off]
    if fullest.tokens_per_s is not None:
        beyond = (fullest.reserved - fullest.live) / MIB, (fullest.on_device - fullest.reserved) / MIB
        whole = f"{plan.total / fullest.on_device - 1:+.1%}"
        planned_speed = throughput(Shape.of(arch), Layout.of(config, arch), find_hardware(args.hardware)).tokens_per_s
        speed = f"{fullest.tokens_per_s:,.0f}", f"{planned_speed / fullest.tokens_per_s - 1:+.1%}"
        cells += [*(f"{size:,.0f}" for size in (*beyond, fullest.on_device / MIB)), whole, *speed]
    return cells, *off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hardware", default="h100-80g", choices=known_hardware(), help="GPU of --device cuda")
    parser.add_argument("--cases", help="numbers of rows, from 0; default: all")
    parser.add_argument("--seq-length", type=int, help="default: 1024 on a CPU, 4096 on a GPU")
    parser.add_argument("--part", choices=("rank", "counted"), help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    cases = ON_GPU if args.device == "cuda" else ON_CPU
    args.seq_length = args.seq_length or (4096 if args.device == "cuda" else 1024)
    chosen = range(len(cases)) if args.cases is None else [int(number) for number in args.cases.split(",")]
    if args.part:
        config, arch = run_config(cases[chosen[0]], args.model_dir, args), read_architecture(args.model_dir)
        on_gpu = args.device == "cuda"
        print(json.dumps(one_rank(config, arch) if args.part == "rank" else counted(config, arch, on_gpu)))
        return
    head = ["MiB of the rank that holds most", "measured", "planner", "dry run", "planner off", "dry run off"]
    if args.device == "cuda":
        head += ["reserved beyond", "device beyond", "device in all", "plan's total off", "tokens/s", "plan's off"]
    for cells in (head, ["---"] * len(head)):
        print(f"| {' | '.join(cells)} |", flush=True)
    deviations = []
    for number in chosen:
        cells, *off = row(number, cases[number], args)
        print(f"| {' | '.join(cells)} |", flush=True)
        deviations.append(off)
    for who, column in zip(("planner", "dry run"), zip(*deviations, strict=True), strict=True):
        off = [abs(deviation) for deviation in column]
        print(f"{who}: median {statistics.median(off):.1%}, at most {max(off):.1%} off")


if __name__ == "__main__":
    main()
