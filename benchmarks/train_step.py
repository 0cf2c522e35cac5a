"""How long one training step takes, as ratios within one run: against transformers, and over two ranks.

    python benchmarks/train_step.py [--sizes small,medium,smollm2-135m] [--repeats 7] [--seq-length 512] [--layouts]

One rank of Megatron-Core (bf16, fp32 gradient sums, master weights and AdamW) against transformers (SDPA, bf16
parameters, torch's fused AdamW) on the same random weights and tokens, one thread each. The two take turns, so that
what else runs on the machine meets both; medians. CPU time is the figure to trust on a shared machine. `--layouts`
adds TP2, PP2 and DP2 on two ranks against one rank. Where a GPU is found the same runs there, with wall time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()

from checkpoint_convert.families import read_architecture  # noqa: E402
from megatron_cpt.config.load import build_config  # noqa: E402
from megatron_cpt.runtime.distributed import init_parallel_groups, init_runtime, shutdown_runtime  # noqa: E402
from megatron_cpt.train import step as step_module  # noqa: E402
from megatron_cpt.train.state import TrainState, build_train_state, unwrap  # noqa: E402
from megatron_cpt.train.step import train_step  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 8, "kv": 4, "ffn": 704, "vocab": 4096},
    "medium": {"hidden": 384, "layers": 12, "heads": 6, "kv": 2, "ffn": 1024, "vocab": 16384},
    "smollm2-135m": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "ffn": 1536, "vocab": 49152},
}
LAYOUTS: dict[str, dict[str, int]] = {"single": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}}


def write_model(size: str, folder: Path) -> Path:
    """A Hugging Face directory of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape["hidden"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv"], intermediate_size=shape["ffn"], vocab_size=shape["vocab"],
            max_position_embeddings=8192, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder / size)
    return folder / size


def run_config(model_dir: Path, args: argparse.Namespace, ranks: int = 1, **parallel: int) -> Any:
    tree = {
        "job_name": "benchmark",
        "model": {"init_from": str(model_dir), "attention": args.attention},
        "batch": {
            "seq_length": args.seq_length,
            "micro_batch_size": args.micro_batch_size,
            "global_batch_size": args.global_batch_size,
        },
        "parallel": {"gpus_per_node": ranks, **parallel},
        "precision": {"dtype": "bf16"},
    }
    return build_config(tree)


def microbatches(state: TrainState, args: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (args.micro_batch_size, args.seq_length + 1)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, state.arch.vocab_size, shape, generator=generator)
        made.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(shape[0], shape[1] - 1),
                "position_ids": torch.arange(shape[1] - 1).expand(shape[0], -1),
            }
        )
    return made


def transformers_step(
    model_dir: Path, batches: list[dict[str, torch.Tensor]], device: torch.device
) -> Callable[[], float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            logits = model(batch["tokens"].to(device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].to(device).flatten())
            (loss / len(batches)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total / len(batches)

    return step


def interleave(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each, taken in turns after two warm-up rounds."""
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for round_ in range(repeats + 2):
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 2:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {"cpu_seconds": statistics.median(c for c, _ in t), "wall_seconds": statistics.median(w for _, w in t)}
        for name, t in taken.items()
    }


@contextmanager
def timed_parts(state: TrainState) -> Iterator[dict[str, float]]:
    """CPU seconds by part of the step, while the context is open; the backward pass is what remains."""
    spent: dict[str, float] = defaultdict(float)
    handles = []
    for chunk in state.chunks:
        bare = unwrap(chunk)
        parts = {"embedding": [getattr(bare, "embedding", None)], "head": [getattr(bare, "output_layer", None)]}
        parts["attention core"] = [layer.self_attention.core_attention for layer in bare.decoder.layers]
        parts["attention linear"] = [
            m
            for layer in bare.decoder.layers
            for m in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj)
        ]
        parts["mlp"] = [layer.mlp for layer in bare.decoder.layers]
        parts["layers in all"] = list(bare.decoder.layers)
        parts["forward in all"] = [chunk]
        for name, modules in parts.items():
            for module in filter(None, modules):
                started: list[float] = []
                handles.append(module.register_forward_pre_hook(lambda *_, s=started: s.append(time.process_time())))
                handles.append(
                    module.register_forward_hook(
                        lambda *_, s=started, n=name: spent.__setitem__(n, spent[n] + time.process_time() - s.pop())
                    )
                )
    update = step_module._update

    def timed_update(*args: Any) -> Any:
        started_at = time.process_time()
        result = update(*args)
        spent["optimizer"] += time.process_time() - started_at
        return result

    step_module._update = timed_update
    began = time.process_time()
    yield spent
    spent["step in all"] = time.process_time() - began
    step_module._update = update
    for handle in handles:
        handle.remove()


def single_rank(size: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model_dir = write_model(size, folder)
    config = run_config(model_dir, args)
    init_parallel_groups(config)
    state = build_train_state(config, read_architecture(model_dir))
    batches = microbatches(state, args, args.global_batch_size // args.micro_batch_size)

    def ours() -> float:
        return train_step(state, iter(batches), len(batches)).loss

    steps = {"megatron": ours, "transformers": transformers_step(model_dir, batches, state.device)}
    medians = interleave(steps, args.repeats)
    with timed_parts(state) as parts:
        ours()
    result = {"size": size, "attention": args.attention, "adam": state.adam, **medians}
    for kind in ("cpu_seconds", "wall_seconds"):
        result[f"{kind}_ratio"] = medians["megatron"][kind] / medians["transformers"][kind]
    result["parts_cpu_seconds"] = {name: round(seconds, 4) for name, seconds in parts.items()}
    result["tokens_per_wall_second"] = args.global_batch_size * args.seq_length / medians["megatron"]["wall_seconds"]
    return result


def one_layout(args: argparse.Namespace) -> None:
    """A rank of a layout's launch: median wall seconds of a step, summed CPU seconds of all ranks."""
    config = run_config(Path(args.model_dir), args, args.ranks, **LAYOUTS[args.layout])
    runtime = init_runtime(config)
    state = build_train_state(config, read_architecture(Path(args.model_dir)))
    dp = 2 if args.layout == "dp2" else 1
    batches = microbatches(state, args, args.global_batch_size // args.micro_batch_size // dp)
    medians = interleave({"megatron": lambda: train_step(state, iter(batches), len(batches)).loss}, args.repeats)
    cpu = torch.tensor([medians["megatron"]["cpu_seconds"]])
    torch.distributed.all_reduce(cpu)
    if runtime.rank == 0:
        print(json.dumps({"wall_seconds": medians["megatron"]["wall_seconds"], "cpu_seconds": cpu.item()}))
    shutdown_runtime()


def layouts(size: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"size": size}
    for layout in LAYOUTS:
        ranks = 1 if layout == "single" else 2
        if any(SIZES[size][key] % LAYOUTS[layout].get("tp", 1) for key in ("heads", "kv")):
            continue
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__, "--layout", layout, "--ranks", str(ranks)]
        command += ["--model-dir", str(folder / size), "--repeats", str(args.repeats)]
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "attention"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        found[layout] = json.loads(out.stdout.splitlines()[-1])
    for layout in found.keys() - {"size", "single"}:
        found[layout]["wall_ratio"] = found[layout]["wall_seconds"] / found["single"]["wall_seconds"]
        found[layout]["cpu_ratio"] = found[layout]["cpu_seconds"] / found["single"]["cpu_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--attention", default="auto", choices=("auto", "te", "sdpa", "block_causal", "unfused"))
    parser.add_argument("--layouts", action="store_true", help="also TP2, PP2 and DP2 on two ranks")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    if args.layout:
        one_layout(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        init_runtime(run_config(Path(folder), args))
        for size in args.sizes.split(","):
            print(json.dumps(single_rank(size, Path(folder), args)), flush=True)
        shutdown_runtime()
        if args.layouts:
            for size in args.sizes.split(","):
                print(json.dumps(layouts(size, Path(folder), args)), flush=True)


if __name__ == "__main__":
    main()
