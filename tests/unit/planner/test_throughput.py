"""The speed of a step moves as theory says, and meets published measurements that a wrong constant misses."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.planner_accuracy import ROWS, constant_mfu_error, log_error, out_of_scope, point, summary
from megatron_cpt.errors import ConfigError
from megatron_cpt.planner.hardware import find_hardware, known_hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.throughput import Shape, Throughput, throughput

H100 = find_hardware("h100-80g")
SHAPE = Shape(80, 8192, 29568, 64, 8, 128, 152064)


def layout(**changes: Any) -> Layout:
    pp = changes.get("pp", 4)
    base = Layout(8, pp, None, 1, 1, 8, 1, 256, 4096, (80 // pp,) * pp, sequence_parallel=True)
    return replace(base, **changes)


def speed(**changes: Any) -> Throughput:
    return throughput(SHAPE, layout(**changes), H100)


def test_the_parts_of_a_step_make_the_step_and_the_tokens() -> None:
    found = speed()
    assert found.tokens_per_s == pytest.approx(256 * 4096 / found.step.total)
    assert found.tokens_per_s_per_gpu == pytest.approx(found.tokens_per_s / 32)
    assert 0.3 < found.mfu < 0.6


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"micro_batches": 8}, {"micro_batches": 64}),  # the bubble
        ({}, {"vpp": 5}),
        ({"recompute": "full"}, {}),
        ({"recompute": "selective", "recompute_modules": ("mlp",)}, {}),
        ({"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("mlp",)}),
        ({"attention": "unfused"}, {}),
        ({"dp": 8, "micro_batches": 8}, {"dp": 8, "micro_batches": 8, "overlap_grad_reduce": True}),
        ({}, {"overlap_tensor_parallel": True}),
        ({"offload_ratio": 1.0}, {}),
        ({}, {"fp8": True}),
        ({"layers_per_stage": (17, 21, 21, 21)}, {}),
    ],
)
def test_speed_moves_the_right_way(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert speed(**slower).tokens_per_s < speed(**faster).tokens_per_s


def test_a_gpu_without_fp8_computes_in_bf16() -> None:
    a100 = find_hardware("a100-80g")
    assert throughput(SHAPE, layout(fp8=True), a100) == throughput(SHAPE, layout(), a100)


def test_flops_are_six_per_weight_and_causal_attention() -> None:
    weights = 80 * SHAPE.layer_weights + SHAPE.head_weights
    assert SHAPE.flops_per_token(4096) == 6 * weights + 6 * 80 * 4096 * 64 * 128


def test_published_speeds_of_h100_are_met_and_a_wrong_constant_misses_them() -> None:
    """With the planner's constants. What they are worth on rows that they have not seen, the benchmark says."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        points = [point(row) for row in csv.DictReader(file) if out_of_scope(row) is None]
    count, median, most = summary(log_error(p, dict(H100.efficiency)) for p in points)
    assert count == 200 and median < 0.05 and most < 0.15
    wrong = {**H100.efficiency, "bf16": 0.5, "fp8": 0.4}
    assert summary(log_error(p, wrong) for p in points)[1] > 0.1
    constant = {"bf16": 0.5, "fp8": 0.35}
    assert summary(constant_mfu_error(p, constant) for p in points)[2] > most


@pytest.mark.parametrize("name", known_hardware())
def test_every_gpu_has_what_a_plan_needs_and_says_where_from(name: str) -> None:
    gpu = find_hardware(name.upper())
    assert "data sheet" in gpu.source
    assert set(gpu.efficiency) >= {"bf16", "fp32", "attention", "hbm", "link", "overlap"}
    assert set(gpu.peak_flops) <= set(gpu.efficiency)
    assert throughput(SHAPE, layout(), gpu).mfu < 1


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        find_hardware("h100-80gb")
    assert "did you mean 'h100-80g'" in str(caught.value.hint)


def test_adapters_save_the_gradients_of_the_frozen_weights() -> None:
    full, lora = speed().step, speed(lora_rank=16).step
    assert 2 / 3 < lora.products / full.products < 0.7
    assert lora.optimizer < 0.01 * full.optimizer
    frozen = SHAPE.flops_per_token(4096, frozen=True)
    assert SHAPE.flops_per_token(4096) - frozen == 2 * (80 * SHAPE.layer_weights + SHAPE.head_weights)
