"""How long one training step takes, as ratios within one run: against transformers, and over two ranks.

    python benchmarks/train_step.py [--sizes small,medium,smollm2-135m] [--repeats 5] [--layouts [medium]]
    python benchmarks/train_step.py --device cuda                       # on one GPU: Qwen2-1.5B and 7B shapes

One rank of Megatron-Core (bf16, fp32 gradient sums, master weights and AdamW) against transformers (SDPA, bf16
parameters, torch's fused AdamW) on the same random weights and tokens, one thread each. The two take turns, so that
what else runs on the machine meets both; medians. CPU time is the figure to trust on a shared machine. `--layouts`
adds TP2, PP2 and DP2 on two ranks against one rank. The share of each part of a step is of one more step, by the
clock of the processor (of the wall for several ranks, which wait for each other, and for a GPU).

On a GPU (sequences of 4,096, bf16) the two run one after the other, for both do not fit; the shape loses layers until
18 bytes per parameter take at most 60 % of the memory. MFU is of the data sheet's peak, and of a matrix product
measured beside it.
"""

from __future__ import annotations

import argparse
import gc
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

from megatron_cpt.architecture.families import read_architecture  # noqa: E402
from megatron_cpt.config.load import build_config  # noqa: E402
from megatron_cpt.config.sections.batch import BatchConfig  # noqa: E402
from megatron_cpt.config.trainable import trainable_of  # noqa: E402
from megatron_cpt.data.micro_batch import MicroBatch  # noqa: E402
from megatron_cpt.model.spec import resolve_attention  # noqa: E402
from megatron_cpt.runtime.distributed import init_parallel_groups, init_runtime, shutdown_runtime  # noqa: E402
from megatron_cpt.train import step as step_module  # noqa: E402
from megatron_cpt.train.state import TrainState, build_train_state, unwrap  # noqa: E402
from megatron_cpt.train.step import train_step  # noqa: E402
from megatron_cpt.train.throughput import peak_flops  # noqa: E402

Step = Callable[[], float]
Batches = list[MicroBatch]

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 8, "kv": 4, "ffn": 704, "vocab": 4096},
    "medium": {"hidden": 384, "layers": 12, "heads": 6, "kv": 2, "ffn": 1024, "vocab": 16384},
    "smollm2-135m": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "ffn": 1536, "vocab": 49152},
    "qwen2-1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv": 2, "ffn": 8960, "vocab": 151936},
    "qwen2-7b": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "ffn": 18944, "vocab": 152064, "tied": False},
}
ON_CPU, ON_GPU = "small,medium,smollm2-135m", "qwen2-1.5b,qwen2-7b"
LAYOUTS = ("single", "tp2", "pp2", "pp2_uneven", "dp2")
PARTS = (
    "data", "embedding", "attention", "MLP", "norms and residuals", "head + loss", "gradient reduction", "optimizer",
    "communication", "other",
)  # fmt: skip


def hf_config(size: str, layers: int | None = None) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    shape = SIZES[size]
    return (Qwen2Config if "qwen2" in size else LlamaConfig)(
        hidden_size=shape["hidden"], num_hidden_layers=layers or shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"], intermediate_size=shape["ffn"], vocab_size=shape["vocab"],
        max_position_embeddings=8192, tie_word_embeddings=shape.get("tied", True), dtype="bfloat16",
    )  # fmt: skip


def write_model(size: str, folder: Path) -> Path:
    """A Hugging Face directory of this shape with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config(size)).to(torch.bfloat16).save_pretrained(folder / size)
    return folder / size


def run_config(model_dir: Path, args: argparse.Namespace, ranks: int = 1, **changes: Any) -> Any:
    tree = {
        "job_name": "benchmark",
        "model": {"init_from": str(model_dir), "attention": args.attention, **changes.pop("model", {})},
        "batch": {
            "seq_length": args.seq_length,
            "micro_batch_size": args.micro_batch_size,
            "global_batch_size": args.global_batch_size,
        },
        "parallel": {"gpus_per_node": ranks, **changes},
        "precision": {"dtype": "bf16"},
    }
    return build_config(tree)


def microbatches(vocab_size: int, args: argparse.Namespace | BatchConfig, ranks: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(0)
    shape = (args.micro_batch_size, args.seq_length + 1)
    made: Batches = []
    for _ in range(args.global_batch_size // args.micro_batch_size // ranks):
        tokens = torch.randint(0, vocab_size, shape, generator=generator)
        made.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(shape[0], shape[1] - 1),
                "position_ids": torch.arange(shape[1] - 1).expand(shape[0], -1),
            }
        )
    return made


def megatron_step(state: TrainState, batches: Batches) -> Step:
    return lambda: train_step(state, batches).loss


def transformers_step(model: Any, batches: Batches, device: torch.device) -> Step:
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


def interleave(steps: dict[str, Step], repeats: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each, taken in turns after the warm-up rounds."""
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for round_ in range(repeats + warm_up):
        for name, step in steps.items():
            cpu, wall = time.process_time(), wall_clock()
            step()
            if round_ >= warm_up:
                taken[name].append((time.process_time() - cpu, wall_clock() - wall))
    return {
        name: {"cpu_seconds": statistics.median(c for c, _ in t), "wall_seconds": statistics.median(w for _, w in t)}
        for name, t in taken.items()
    }


def wall_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PartClock:
    """Seconds by part: at any moment the clock runs for one part, until another one is entered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.spent, self.part, self.since = clock, defaultdict[str, float](float), "other", clock()

    def enter(self, part: str) -> str:
        """Run for `part` from now on; the part before it."""
        now, before = self.clock(), self.part
        self.spent[before] += now - self.since
        self.part, self.since = part, now
        return before

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return timed

    def watch(self, module: torch.nn.Module, part: str, after: str) -> list[Any]:
        """Enter `part` with the module's forward pass, and with its backward pass; `after` when either is through."""

        def when_known(tensor: Any, entered: str) -> None:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: (self.enter(entered), None)[1])

        def before(_: Any, inputs: Any) -> None:
            when_known(inputs[0] if inputs else None, after)
            self.enter(part)

        def behind(_: Any, __: Any, output: Any) -> None:
            when_known(output[0] if isinstance(output, tuple) else output, part)
            self.enter(after)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]


@contextmanager
def timed_parts(state: TrainState, clock: Callable[[], float]) -> Iterator[PartClock]:
    """Seconds by part of the step, forward and backward, while the context is open."""
    parts, rest = PartClock(clock), "norms and residuals"
    handles: list[Any] = []
    for chunk in state.chunks:
        bare = unwrap(chunk)
        for layer in bare.decoder.layers:
            handles += parts.watch(layer.self_attention, "attention", rest) + parts.watch(layer.mlp, "MLP", rest)
        if bare.pre_process:
            handles += parts.watch(bare.embedding, "embedding", rest)
        if bare.post_process:  # from the logits to the gradient of what they are made of
            handles += parts.watch(bare.output_layer, "head + loss", rest)[:1]
    wait = torch.distributed.Work.wait
    names = {"_update": "optimizer", "on_this_rank": "data"}
    originals = {name: getattr(step_module, name) for name in names}
    finalize = state.model_config.finalize_model_grads_func
    torch.distributed.Work.wait = parts.around(wait, "communication")  # type: ignore[method-assign]
    state.model_config.finalize_model_grads_func = parts.around(finalize, "gradient reduction")
    for name, part in names.items():
        setattr(step_module, name, parts.around(originals[name], part))
    try:
        yield parts
        parts.enter("other")
    finally:
        torch.distributed.Work.wait = wait  # type: ignore[method-assign]
        state.model_config.finalize_model_grads_func = finalize
        for name in names:
            setattr(step_module, name, originals[name])
        for handle in handles:
            handle.remove()


def shares(state: TrainState, step: Step, clock: Callable[[], float]) -> dict[str, float]:
    """Share of each part in one step."""
    with timed_parts(state, clock) as parts:
        step()
    total = sum(parts.spent.values())
    return {part: round(seconds / total, 4) for part, seconds in sorted(parts.spent.items())}


def on_cpu(size: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One rank against transformers, in turns."""
    from transformers import AutoModelForCausalLM

    model_dir = write_model(size, folder)
    config = run_config(model_dir, args)
    init_parallel_groups(config)
    state = build_train_state(config, read_architecture(model_dir))
    batches = microbatches(state.arch.vocab_size, args)
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
    ours = megatron_step(state, batches)
    medians = interleave(
        {"megatron": ours, "transformers": transformers_step(theirs, batches, state.device)}, args.repeats
    )
    result: dict[str, Any] = {
        "size": size,
        "attention": resolve_attention(args.attention),
        "adam": state.adam,
        **medians,
    }
    for kind in ("cpu_seconds", "wall_seconds"):
        result[f"{kind}_ratio"] = medians["megatron"][kind] / medians["transformers"][kind]
    result["parts"] = shares(state, ours, time.thread_time)
    return result


def on_gpu(size: str, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """One rank, then transformers, on one GPU: tokens/s and MFU."""
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    layers = SIZES[size]["layers"]
    with tempfile.TemporaryDirectory() as folder:
        while True:
            hf_config(size, layers).save_pretrained(folder)
            arch = read_architecture(Path(folder))
            if 18 * arch.num_parameters < 0.6 * total or layers == 1:
                break
            layers -= 1
        config = run_config(Path("random"), args, model={"architecture": folder})
    init_parallel_groups(config)
    batches = microbatches(arch.vocab_size, args)
    per_step = args.global_batch_size * args.seq_length
    flops = trainable_of(config, arch).flops_per_token(args.seq_length)
    peak = peak_flops(torch.cuda.get_device_name(device))
    result: dict[str, Any] = {"size": size, "layers": layers, "parameters": arch.num_parameters, "ceiling": ceiling}

    def note(name: str, step: Step) -> None:
        torch.cuda.reset_peak_memory_stats(device)
        seconds = interleave({name: step}, args.repeats, warm_up=3)[name]["wall_seconds"]
        done = per_step * flops / seconds
        result[name] = {
            "wall_seconds": seconds,
            "tokens_per_second": per_step / seconds,
            "mfu": None if peak is None else done / peak,
            "share_of_ceiling": done / ceiling,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        }

    state = build_train_state(config, arch)
    ours = megatron_step(state, batches)
    result |= {"attention": resolve_attention(args.attention), "adam": state.adam}
    note("megatron", ours)
    result["parts"] = shares(state, ours, wall_clock)
    del state, ours
    gc.collect()
    torch.cuda.empty_cache()
    from transformers import AutoModelForCausalLM

    with device:
        theirs = AutoModelForCausalLM.from_config(hf_config(size, layers), attn_implementation="sdpa")
    note("transformers", transformers_step(theirs.to(torch.bfloat16).train(), batches, device))
    del theirs
    gc.collect()
    torch.cuda.empty_cache()
    result["speed_ratio"] = result["megatron"]["tokens_per_second"] / result["transformers"]["tokens_per_second"]
    return result


def matmul_ceiling(side: int = 8192) -> float:
    """FLOP/s of a square bf16 matrix product on the GPU, the best of ten."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = wall_clock()
        for _ in range(5):
            a @ b
        best = min(best, (wall_clock() - started) / 5)
    return 2 * side**3 / best


def layout_of(name: str, size: str) -> dict[str, int]:
    """Keys of `parallel`; the uneven pipeline gives the last stage fewer layers, for its logits."""
    shape = SIZES[size]
    head_dim = shape["hidden"] // shape["heads"]
    layer = shape["hidden"] * (2 * shape["hidden"] + 2 * shape["kv"] * head_dim + 3 * shape["ffn"])
    fewer = round(shape["vocab"] * shape["hidden"] / layer / 4)  # half of what the products alone would say
    return {
        "tp2": {"tp": 2},
        "pp2": {"pp": 2},
        "pp2_uneven": {"pp": 2, "last_stage_layers": max(1, shape["layers"] // 2 - fewer)},
    }.get(name, {})


def one_layout(args: argparse.Namespace) -> None:
    """A rank of a layout's launch: median wall seconds of a step, summed CPU seconds of all ranks, mean shares."""
    torch.set_num_threads(1)
    model_dir = Path(args.model_dir)
    config = run_config(model_dir, args, args.ranks, **layout_of(args.layout, model_dir.name))
    runtime = init_runtime(config)
    state = build_train_state(config, read_architecture(model_dir))
    step = megatron_step(state, microbatches(state.arch.vocab_size, args, 2 if args.layout == "dp2" else 1))
    medians = interleave({"megatron": step}, args.repeats)["megatron"]
    mine = {**medians, "parts": shares(state, step, wall_clock)}
    every: list[Any] = [None] * args.ranks
    torch.distributed.all_gather_object(every, mine)
    if runtime.rank == 0:
        found = {
            "wall_seconds": medians["wall_seconds"],
            "cpu_seconds": sum(one["cpu_seconds"] for one in every),
            "cpu_seconds_of_ranks": [one["cpu_seconds"] for one in every],
            "parts": {part: statistics.mean(one["parts"].get(part, 0.0) for one in every) for part in PARTS},
        }
        print(json.dumps(found))
    shutdown_runtime()


def layouts(size: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    if not (folder / size).is_dir():
        write_model(size, folder)
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        ranks = 1 if layout == "single" else 2
        if any(SIZES[size][key] % layout_of(layout, size).get("tp", 1) for key in ("heads", "kv")):
            print(f"{size}: {layout} left out, {SIZES[size]['heads']} heads", file=sys.stderr)
            continue
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__, "--layout", layout, "--ranks", str(ranks)]
        command += ["--model-dir", str(folder / size), "--repeats", str(args.repeats)]
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "attention"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[layout] = json.loads(out.stdout.splitlines()[-1])
    for layout in found.keys() - {"single"}:
        found[layout]["wall_ratio"] = found[layout]["wall_seconds"] / found["single"]["wall_seconds"]
        found[layout]["cpu_ratio"] = found[layout]["cpu_seconds"] / found["single"]["cpu_seconds"]
    return {"size": size, "layouts": found}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def percentages(parts: dict[str, float]) -> list[str]:
    return [f"{100 * parts.get(part, 0.0):.1f}" for part in PARTS]


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown, as benchmarks/RESULTS.md has it."""
    alone = [r for r in results if "cpu_seconds_ratio" in r]
    gpu = [r for r in results if "ceiling" in r]
    made = []
    if alone:
        head = ["One rank", "attention", "step, CPU s", "transformers", "CPU ratio", "wall ratio"]
        made.append(table(head, [
            [
                r["size"], r["attention"], f"{r['megatron']['cpu_seconds']:.2f}",
                f"{r['transformers']['cpu_seconds']:.2f}", f"{r['cpu_seconds_ratio']:.2f}",
                f"{r['wall_seconds_ratio']:.2f}",
            ]
            for r in alone
        ]))  # fmt: skip
    if gpu:
        head = ["One GPU", "layers", "tokens/s", "MFU", "of the matmul ceiling", "peak GiB", "transformers, tokens/s"]
        made.append(table([*head, "speed ratio"], [
            [
                r["size"], str(r["layers"]), f"{r['megatron']['tokens_per_second']:,.0f}",
                "?" if r["megatron"]["mfu"] is None else f"{r['megatron']['mfu']:.1%}",
                f"{r['megatron']['share_of_ceiling']:.1%}", f"{r['megatron']['peak_gib']:.0f}",
                f"{r['transformers']['tokens_per_second']:,.0f}", f"{r['speed_ratio']:.2f}",
            ]
            for r in gpu
        ]))  # fmt: skip
    if alone or gpu:
        made.append(table(["% of a step", *PARTS], [[r["size"], *percentages(r["parts"])] for r in alone + gpu]))
    for r in results:
        if "layouts" not in r:
            continue
        head = [f"{r['size']}", "step, wall s", "wall ratio", "CPU ratio", "CPU s of each rank"]
        made.append(table(head, [
            [
                name, f"{one['wall_seconds']:.2f}", f"{one.get('wall_ratio', 1):.2f}",
                f"{one.get('cpu_ratio', 1):.2f}", " + ".join(f"{s:.2f}" for s in one["cpu_seconds_of_ranks"]),
            ]
            for name, one in r["layouts"].items()
        ]))  # fmt: skip
        rows = [[name, *percentages(one["parts"])] for name, one in r["layouts"].items()]
        made.append(table(["% of a step's wall time, mean of the ranks", *PARTS], rows))
    return "\n\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", help=f"default {ON_CPU}; with --device cuda {ON_GPU}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seq-length", type=int, help="default 512; with --device cuda 4096")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, help="default 2; with --device cuda 8")
    parser.add_argument("--attention", default="auto", choices=("auto", "te", "sdpa", "block_causal", "unfused"))
    parser.add_argument("--layouts", nargs="?", const="medium", default="", help="also two ranks, at these sizes")
    parser.add_argument("--layouts-batch-size", type=int, default=8, help="samples per step of the two-rank layouts")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    gpu = args.device == "cuda"
    if gpu != torch.cuda.is_available():
        parser.error("no GPU is visible here" if gpu else "a GPU is visible: --device cuda, or CUDA_VISIBLE_DEVICES=")
    args.sizes = (args.sizes or (ON_GPU if gpu else ON_CPU)).split(",")
    args.seq_length = args.seq_length or (4096 if gpu else 512)
    args.global_batch_size = args.global_batch_size or (8 if gpu else 2)
    logging.disable(logging.INFO)
    if args.layout:
        one_layout(args)
        return
    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        print(json.dumps(result), file=sys.stderr, flush=True)
        results.append(result)

    with tempfile.TemporaryDirectory() as folder:
        init_runtime(run_config(Path(folder), args))
        if gpu:
            ceiling = matmul_ceiling()
        else:
            torch.set_num_threads(1)
        for size in args.sizes:
            add(on_gpu(size, args, ceiling) if gpu else on_cpu(size, Path(folder), args))
        shutdown_runtime()
        args.global_batch_size = args.layouts_batch_size
        for size in filter(None, args.layouts.split(",")):
            add(layouts(size, Path(folder), args))
    print(tables(results))


if __name__ == "__main__":
    main()
