"""What the terms against forgetting add to a training step, as ratios to a plain step in one run.

    python benchmarks/forgetting.py [--size smollm2-135m] [--repeats 5] [--top-k 32]
    python benchmarks/forgetting.py --device cuda --size qwen2-1.5b --seq-length 4096

One rank, one model, one thread on a CPU; the same step plain, with KL to a frozen reference that runs beside it, with
KL from stored targets on disk, and with EWC. They take turns, so that what else runs on the machine meets all; medians.
CPU time is the figure to trust on a shared machine. The aims are 1.4, 1.1 and 1.03 times a plain step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_step import Step, interleave, microbatches, run_config, table, write_model
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.sections.forgetting import KlConfig
from megatron_cpt.forgetting.ewc import WeightPenalty
from megatron_cpt.forgetting.kl import KlToBase, KlToStored
from megatron_cpt.forgetting.kl_store import KlStore
from megatron_cpt.forgetting.reference import load_reference
from megatron_cpt.launch.origin import Origin
from megatron_cpt.model.owned_parameters import owned_parameters
from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
from megatron_cpt.train.state import TrainState, build_train_state, unwrap
from megatron_cpt.train.step import train_step
from megatron_cpt.train.terms import LossTerm

AIMS = {"KL online": 1.4, "KL offline": 1.1, "EWC": 1.03}


def steps_of(state: TrainState, model_dir: Path, folder: Path, args: argparse.Namespace) -> dict[str, Step]:
    """The four steps on one state; every token counts in KL."""
    config, arch = state.config, state.arch
    batches = microbatches(arch.vocab_size, args)
    for number, batch in enumerate(batches):
        batch["source"] = torch.zeros(args.micro_batch_size, dtype=torch.int64)
        first = number * args.micro_batch_size
        batch["offset_tokens"] = args.seq_length * torch.arange(first, first + args.micro_batch_size)
    online = KlToBase(
        KlConfig(weight=0.1), load_reference(config, arch, Origin("hf", model_dir)), ["text"], arch.vocab_size
    )
    asked = KlConfig(weight=0.1, offline_top_k=args.top_k)
    store = write_targets(folder, arch.vocab_size, args)
    offline = KlToStored(asked, {"text": store}, ["text"], arch.vocab_size)
    owned = owned_parameters([unwrap(chunk) for chunk in state.chunks], state.optimizer)
    ewc = WeightPenalty(1.0, [p.values.clone() for p in owned], [torch.rand_like(p.values) for p in owned])

    def step(terms: tuple[LossTerm, ...] = (), penalties: tuple[WeightPenalty, ...] = ()) -> Step:
        def one() -> float:
            for batch in batches:
                batch.pop("term_tensors", None)
            state.penalties = penalties
            return train_step(state, batches, num_sources=1, terms=terms).loss

        return one

    return {"plain": step(), "KL online": step((online,)), "KL offline": step((offline,)), "EWC": step((), (ewc,))}


def write_targets(folder: Path, vocab_size: int, args: argparse.Namespace) -> KlStore:
    """Targets of random tokens, on disk."""
    tokens = args.global_batch_size * args.seq_length
    paths = folder / "ids", folder / "logq"
    paths[0].write_bytes(bytes(4 * tokens * args.top_k))
    paths[1].write_bytes(bytes(2 * tokens * (args.top_k + 1)))
    store = KlStore(*paths, tokens, args.top_k, "r+")
    ids = torch.stack([torch.randperm(vocab_size)[: args.top_k] for _ in range(tokens)])
    log_q = torch.randn(tokens, args.top_k + 1).log_softmax(dim=1)
    store.write(range(tokens), ids, log_q)
    store.flush()
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--only", default=",".join(AIMS), help="of the steps beside the plain one")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = write_model(args.size, folder)
        config = run_config(model_dir, args)
        init_runtime(config)
        state = build_train_state(config, read_architecture(model_dir))
        wanted = ("plain", *args.only.split(","))
        steps = {name: step for name, step in steps_of(state, model_dir, folder, args).items() if name in wanted}
        medians = interleave(steps, args.repeats)
        shutdown_runtime()
    clock = "cpu_seconds" if args.device == "cpu" else "wall_seconds"
    rows: list[list[str]] = [
        [
            name,
            f"{taken['cpu_seconds']:.2f}",
            f"{taken['wall_seconds']:.2f}",
            f"{taken[clock] / medians['plain'][clock]:.3f}",
            str(AIMS.get(name, "")),
        ]
        for name, taken in medians.items()
    ]
    print(f"{args.size}, {args.global_batch_size} x {args.seq_length} tokens, top {args.top_k}")
    print(table(["step", "CPU s", "wall s", "ratio", "aim"], rows))


if __name__ == "__main__":
    main()
