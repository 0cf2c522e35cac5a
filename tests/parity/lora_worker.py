"""Runs the LoRA rows of one number of ranks in one launch: `torchrun lora_worker.py RANKS MODELS_DIR OUT.json`."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_cpt.architecture.families import read_architecture  # noqa: E402
from megatron_cpt.config.derive import derive  # noqa: E402
from megatron_cpt.peft import adapters  # noqa: E402
from megatron_cpt.runtime.distributed import init_parallel_groups, init_runtime, shutdown_runtime  # noqa: E402
from megatron_cpt.train.state import TrainState, build_train_state, gathered_parameters, unwrap  # noqa: E402
from megatron_cpt.train.step import train_step  # noqa: E402
from tests.parity.lora_rows import BF16_ROWS, LORA_ROWS, LORA_STEPS, LoraRow, sabotaged, values  # noqa: E402
from tests.parity.rows import TrainRow  # noqa: E402
from tests.parity.shared_groups import run_worker  # noqa: E402
from tests.parity.worker import batches, config_of  # noqa: E402


def frozen(state: TrainState) -> list[torch.Tensor]:
    return [p for chunk in state.chunks for p in unwrap(chunk).parameters() if not p.requires_grad]


def replicas_differ(state: TrainState) -> float:
    """Largest difference of a factor that every rank of a TP group should hold alike, over all ranks."""
    group, worst = parallel_state.get_tensor_model_parallel_group(), 0.0
    for adapter in adapters.adapters([unwrap(chunk) for chunk in state.chunks], state.arch):
        whole = adapter.pair.A if adapter.pair.kind == "column" else adapter.pair.B
        everywhere = [torch.empty_like(whole) for _ in range(group.size())]
        dist.all_gather(everywhere, whole.detach(), group=group)
        worst = max(worst, *((whole - other).abs().max().item() for other in everywhere))
    found = torch.tensor([worst])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def run(row: LoraRow, models_dir: Path) -> dict[str, Any]:
    config = config_of(TrainRow(row.name, row.ranks, row.settings, model=row.model), models_dir)
    arch = read_architecture(models_dir / row.model)
    derived = derive(config, arch)
    init_parallel_groups(config)
    own = adapters.draw if row.zero_b else values
    with mock.patch.object(adapters, "draw", own), sabotaged(row.sabotage):
        state = build_train_state(config, arch, bucket_elements=row.bucket_elements)
        before = [parameter.detach().clone() for parameter in frozen(state)]
        data = batches(config, arch.vocab_size, documents=False)
        steps = [
            train_step(state, list(islice(data, derived.gradient_accumulation_steps)), num_sources=2)
            for _ in range(LORA_STEPS)
        ]
        with gathered_parameters(state):
            differ = replicas_differ(state)
    trained = [n for chunk in state.chunks for n, p in unwrap(chunk).named_parameters() if p.requires_grad]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "replicas_differ": differ,
        "frozen_unchanged": all(torch.equal(a, b) for a, b in zip(before, frozen(state), strict=True)),
        "only_adapters": all(".lora." in name for name in trained) and bool(trained),
    }


def main() -> None:
    ranks, models_dir, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    rows = [row for row in (*LORA_ROWS, *BF16_ROWS) if row.ranks == ranks]
    runtime = init_runtime(config_of(TrainRow("first", ranks, rows[0].settings), models_dir))
    results = {row.name: run(row, models_dir) for row in rows}
    if runtime.rank == 0:
        out.write_text(json.dumps(results))
    shutdown_runtime()


if __name__ == "__main__":
    run_worker(main)
