"""The planner's formulas against the live bytes of the real model under the real schedule."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import load_config
from megatron_cpt.dry_run.fake_world import as_rank, prepare_process
from megatron_cpt.dry_run.kernels import modules_of_a_gpu
from megatron_cpt.dry_run.rank import build_rank, build_terms, static_bytes
from megatron_cpt.dry_run.schedule import enough_micro_batches, run_step
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import memory_of_stages

MODEL = Path(__file__).resolve().parents[3] / "examples/qwen2_72b"

LAYERS = 32  # of Qwen2-72B's width: more only take longer

LAYOUTS = [
    "",
    "parallel.tp=4 parallel.pp=8",
    "parallel.pp=2",
    "parallel.tp=2 parallel.pp=16 batch.micro_batch_size=2",
    "parallel.vpp=4",
    "parallel.last_stage_layers=5",
    "parallel.nodes=8 parallel.cp=2",
    "parallel.nodes=8 parallel.cp=2 model.attention=sdpa",
    "recompute.granularity=full",
    "recompute.granularity=selective recompute.modules=[mlp]",
    "parallel.sequence_parallel=false",
    "model.attention=unfused batch.seq_length=2048",
    "precision.dtype=fp32 parallel.distributed_optimizer=false",
    "batch.seq_length=16384 parallel.nodes=16 parallel.cp=4",
    "model.dropout=0.1",
    "lora.rank=64",
    "lora.rank=64 recompute.granularity=full",
    "lora.rank=16 lora.targets=[q_proj,v_proj] parallel.sequence_parallel=false",
    "lora.rank=64 lora.dropout=0.1 recompute.granularity=selective recompute.modules=[mlp]",
    "recompute.loss_chunk_tokens=512",
    "recompute.loss_chunk_tokens=1024 parallel.sequence_parallel=false parallel.nodes=4 parallel.pp=1 parallel.tp=8",
    "forgetting.kl.weight=0.5",
    "forgetting.kl.weight=0.5 lora.rank=64",
    "forgetting.kl.weight=0.5 parallel.tp=8 parallel.pp=1",
    "forgetting.kl.weight=0.5 parallel.tp=2 parallel.pp=16 batch.micro_batch_size=2",
    "forgetting.kl.weight=0.5 forgetting.kl.offline_top_k=32",
    "forgetting.kl.weight=0.5 forgetting.kl.offline_top_k=32 precision.dtype=fp32 parallel.tp=2 parallel.pp=16",
    "forgetting.ewc.strength=0.5 forgetting.ewc.fisher=somewhere",
    "forgetting.ewc.strength=0.5 precision.dtype=fp32 parallel.distributed_optimizer=false",
    "forgetting.kl.weight=0.5 precision.dtype=fp32 parallel.nodes=8 parallel.cp=2",
]


def deviations(overrides: str) -> list[float]:
    """How far the formulas are from what is counted, of the first and the last stage, as shares of the whole."""
    config = load_config(MODEL / "config.yaml", (f"model.architecture={MODEL}", *overrides.split()))
    arch = replace(read_architecture(MODEL), num_layers=LAYERS)
    derived = derive(config, arch)
    predicted = memory_of_stages(arch, Layout.of(config, arch))
    pp = config.parallel.pp
    micro_batches = enough_micro_batches(derived.gradient_accumulation_steps, pp)
    found = []
    for stage in sorted({0, pp - 1}):
        with as_rank(config, stage * derived.world_size // pp):
            state = build_rank(config, arch, modules_of_a_gpu(config))
            terms = build_terms(config, arch, modules_of_a_gpu(config))
            static = static_bytes(state, config.optimizer, terms).total
            live = run_step(state, config, micro_batches, on_gpu=True, terms=terms).peak
        assert predicted[stage].static == pytest.approx(static, rel=0.001)
        found.append((predicted[stage].static + predicted[stage].live) / (static + live) - 1)
    return found


def test_the_formulas_are_within_two_percent_of_live_bytes() -> None:
    prepare_process()
    by_layout = {overrides: deviations(overrides) for overrides in LAYOUTS}
    off = [abs(deviation) for found in by_layout.values() for deviation in found]
    assert len(off) >= 2 * len(LAYOUTS) - 2  # two have one stage
    assert statistics.median(off) <= 0.02, by_layout
    assert max(off) <= 0.04, by_layout
