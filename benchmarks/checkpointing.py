"""What a save costs the training loop, synchronous and asynchronous, and what a start costs, cold and resumed.

    python benchmarks/checkpointing.py [--pairs 4] [--model HF_DIR --data PREFIX] [--work FOLDER]

Saves: one rank in this process trains a model of 41 M parameters in bf16 and saves in turns, synchronous and
asynchronous, so that both meet the same machine. Lost is what the loop was held and what the steps until the
checkpoint is complete took beyond the median step without a save.
Start: `megatron-cpt train` with two ranks (PP2) on SmolLM2-135M's shape; random weights unless --model gives others.
Prints one markdown table. About 4 minutes on two idle cores, 5 GB of memory and 6 GB of disk. No network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.synthetic_data import random_documents, write_dataset

if TYPE_CHECKING:
    from megatron_cpt.data.micro_batch import MicroBatch

SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
SMOLLM2_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
START_STEPS = 4
MOST_STEPS_BESIDE_WRITER = 12


@dataclass(frozen=True)
class Save:
    """Seconds, but for the memory."""

    held: float  # the loop, by save()
    held_cpu: float  # of them, on this rank's processor
    slower: float  # the steps until the checkpoint was complete, beyond the median step
    slower_cpu: float
    writer_cpu: float  # of the threads or processes that wrote
    peak_mb: float  # this rank and its writers, shared memory counted once

    @property
    def lost(self) -> float:
        return self.held + self.slower

    @property
    def cpu(self) -> float:
        return self.held_cpu + self.slower_cpu + self.writer_cpu


def write_architecture(folder: Path, shape: dict[str, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048,
             "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
             "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fixed | shape))
    return folder


def write_random_weights(folder: Path, shape: dict[str, int]) -> Path:
    """A model of `shape` in Hugging Face form."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn, head = shape["hidden_size"], shape["intermediate_size"], 64
    keys = shape["num_key_value_heads"] * head
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        sizes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        sizes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "o")}
        sizes |= {f"{layer}.self_attn.{name}_proj.weight": (keys, hidden) for name in ("k", "v")}
        sizes |= {f"{layer}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        sizes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
        for name, size in sizes.items()
    }
    write_architecture(folder, shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_config(work: Path, name: str, data: Path, **sections: Any) -> Path:
    config = {
        "job_name": name,
        "run_dir": str(work / name),
        "batch": {"seq_length": 256, "global_batch_size": 2},
        "schedule": {"kind": "constant"},
        "data": {"train": [{"name": "data", "prefix": str(data)}], "max_epochs": 1e9},
    } | sections
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class MemoryWatch:
    """The largest proportional memory, in MB, of this process and its children since `reset`."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.peak = 0.0

    def _watch(self) -> None:
        import psutil

        this = psutil.Process()
        while True:
            with suppress(psutil.Error):
                pids = [this.pid, *(child.pid for child in this.children(recursive=True))]
                self.peak = max(self.peak, sum(map(proportional_mb, pids)))
            time.sleep(0.1)


def proportional_mb(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1000
    return 0.0


def measure_saves(work: Path, data: Path, pairs: int) -> tuple[list[Save], list[Save], float, float, int]:
    """Synchronous saves, asynchronous ones, the median step, the peak memory of training, bytes of a checkpoint."""
    from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

    adapt_megatron_core_to_cpu()
    from megatron_cpt.config.load import load_config
    from megatron_cpt.launch.preflight import check_run
    from megatron_cpt.runs.checkpoints import complete_checkpoints
    from megatron_cpt.runs.folder import create_run_folder
    from megatron_cpt.runtime.distributed import init_runtime
    from megatron_cpt.train.checkpoint import CheckpointManager
    from megatron_cpt.train.position import Position
    from megatron_cpt.train.state import build_train_state
    from megatron_cpt.train.step import train_step

    architecture = write_architecture(work / "small", SMALL)
    model = {"init_from": "random", "architecture": str(architecture), "check_start": False}
    budget = {"train_tokens": 512_000, "warmup_tokens": 0}
    path = run_config(work, "saves", data, model=model, budget=budget, checkpoint={"keep_last": 1})
    job = check_run(load_config(path), str(path))
    folder = job.folder
    create_run_folder(folder, job.config, job.model_dir)
    init_runtime(job.config)
    state = build_train_state(job.config, job.arch)
    manager = CheckpointManager(job.config, folder, 1, None, 0)

    def step() -> None:
        train_step(state, [random_batch(256, SMALL["vocab_size"]) for _ in range(2)])

    for _ in range(3):
        step()
    watch = MemoryWatch()
    usual = [timed(step) for _ in range(7)]
    usual_step, usual_cpu = (statistics.median(times) for times in zip(*usual, strict=True))
    training_mb = watch.peak
    progress = Position()
    found: dict[bool, list[Save]] = {True: [], False: []}
    for number in range(2 * (pairs + 2)):
        synchronous = number % 2 == 0
        progress = replace(progress, iteration=number + 1)
        begin = partial(manager.save, state, progress, wait=synchronous)
        save = measure_save(begin, manager.poll, step, (usual_step, usual_cpu), watch, complete=synchronous)
        if number >= 4:  # the first two of each kind plan what the later ones reuse
            found[synchronous].append(save)
        step()
    size = complete_checkpoints(folder.checkpoints)[0][1].total_bytes
    return found[True], found[False], usual_step, training_mb, size


def measure_save(
    begin: Callable[[], object],
    poll: Callable[..., bool],
    step: Callable[[], None],
    usual: tuple[float, float],
    watch: MemoryWatch,
    *,
    complete: bool,
) -> Save:
    """One save, and the steps until it is complete; `usual` are the wall and processor seconds of a step without one.

    `complete` says that the save is so when `begin` returns.
    """
    watch.reset()
    writers = writer_cpu()
    held, held_cpu = timed(begin)
    beside: list[tuple[float, float]] = []

    def step_beside_writer() -> None:
        nonlocal complete
        step()
        complete = poll()

    while not complete and len(beside) < MOST_STEPS_BESIDE_WRITER:
        beside.append(timed(step_beside_writer))
    poll(wait=True)
    return Save(
        held,
        held_cpu,
        sum(wall - usual[0] for wall, _ in beside),
        sum(cpu - usual[1] for _, cpu in beside),
        writer_cpu() - writers,
        watch.peak,
    )


def random_batch(length: int, vocabulary: int) -> MicroBatch:
    import torch

    tokens = torch.randint(1, vocabulary, (1, length + 1))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, length),
        "position_ids": torch.arange(length)[None],
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of this thread, the one that trains."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def writer_cpu() -> float:
    """Processor seconds so far of this process's other threads and of its ended children."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + time.process_time() - time.thread_time()


def copy_seconds(count: int) -> float:
    """Of copying so many bytes within memory that is already there: the least that keeping a snapshot costs."""
    source, target = np.ones(count, np.uint8), np.ones(count, np.uint8)
    return min(timed(lambda: np.copyto(target, source))[1] for _ in range(3))


def measure_starts(work: Path, model: Path, data: Path) -> tuple[list[dict[str, float]], float]:
    """Seconds by part of a cold and of a resumed start, and the share of a step that data loading takes."""
    from megatron_cpt.runs.metrics import read_metrics

    rows: list[dict[str, Any]] = []
    for steps in (START_STEPS, 2 * START_STEPS):
        path = run_config(
            work,
            "start",
            data,
            model={"init_from": str(model), "allow_instruct": True, "check_start": False},
            budget={"train_tokens": 512 * steps, "warmup_tokens": 0},
            parallel={"gpus_per_node": 2, "pp": 2},
            checkpoint={"keep_last": 1},
        )
        subprocess.run([sys.executable, "-m", "megatron_cpt", "train", str(path)], check=True, stdout=sys.stderr)
        rows = list(read_metrics(work / "start" / "metrics.jsonl"))
    steps_done = [row for row in rows if "event" not in row]
    starts = []
    for row in (row for row in rows if row.get("event") == "start"):
        first = next(later for later in steps_done if later["time"] > row["time"])
        starts.append({**row["setup_seconds"], "first step": first["time"] - row["time"]})
    share = sum(row["data_seconds"] for row in steps_done) / sum(row["step_seconds"] for row in steps_done)
    return starts, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="measured saves of each kind")
    parser.add_argument("--model", type=Path, help="Hugging Face directory for the starts")
    parser.add_argument("--data", type=Path, help="dataset of --model's tokenizer")
    parser.add_argument("--work", type=Path, help="where scratch files go")
    arguments = parser.parse_args()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        data = write_dataset(work / "data", random_documents(2000, 20000, 1, longest=600), vocab_size=30000)
        model = arguments.model or write_random_weights(work / "smollm2", SMOLLM2_135M)
        (cold, resumed), share = measure_starts(work, model, arguments.data or data)
        held, beside, step, training_mb, size = measure_saves(work, data, arguments.pairs)
        copy = copy_seconds(size)

    def middle(saves: list[Save], value: Callable[[Save], float]) -> float:
        return statistics.median(map(value, saves))

    lines: list[tuple[str, Callable[[Save], float]]] = [
        ("loop held, s", lambda s: s.held),
        ("of that on the processor, s", lambda s: s.held_cpu),
        ("following steps longer by, s", lambda s: s.slower),
        ("of that on the processor, s", lambda s: s.slower_cpu),
        ("lost in all, s", lambda s: s.lost),
        ("CPU seconds, rank and writers", lambda s: s.cpu),
        ("peak memory, MB", lambda s: s.peak_mb),
    ]
    print(f"| save of {size:,} bytes, 41 M parameters, bf16 | synchronous | asynchronous | ratio |")
    print("|---|---|---|---|")
    for label, value in lines:
        first, second = middle(held, value), middle(beside, value)
        print(f"| {label} | {first:.2f} | {second:.2f} | {second / first if first else float('nan'):.1%} |")
    print(f"| peak memory of training without saves, MB | {training_mb:.0f} | {training_mb:.0f} | |")
    print(f"| usual step, s | {step:.2f} | {step:.2f} | |")
    print(f"| copying as many bytes in memory, s | {copy:.2f} | {copy:.2f} | |")
    print("| **start of the 135M shape, PP2, s** | **cold** | **resumed** | |")
    for part in cold:
        print(f"| {part.replace('_', ' ')} | {cold[part]:.2f} | {resumed.get(part, 0.0):.2f} | |")
    print(f"| all | {sum(cold.values()):.2f} | {sum(resumed.values()):.2f} | |")
    print(f"| data loading, share of a step | {share:.3%} | | |")
    sys.stdout.flush()
    os._exit(0)  # the engine's queue server and watch threads need not be waited for


if __name__ == "__main__":
    main()
