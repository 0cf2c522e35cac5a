"""Bytes of a rank: exact where they can be counted, and moving the right way where they are predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import load_config
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import (
    activation_bytes_of_layer,
    layers_in_flight,
    memory_of_stages,
    optimizer_bytes_per_parameter,
    parameters_of_stage,
    worst_stage,
)
from megatron_cpt.presets import presets

REPO = Path(__file__).resolve().parents[3]
CONFIG, MODEL = REPO / "examples/qwen2_72b/config.yaml", REPO / "examples/qwen2_72b"
ARCH = read_architecture(MODEL)
GIB = 2**30


def layout(*overrides: str, **changes: Any) -> Layout:
    config = load_config(CONFIG, (f"model.architecture={MODEL}", *overrides))
    derive(config, ARCH)
    return replace(Layout.of(config, ARCH), **changes)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.tp=1",),
        ("parallel.pp=1",),
        ("parallel.tp=4", "parallel.pp=8"),
        ("parallel.last_stage_layers=17",),
        ("parallel.vpp=5",),
        ("parallel.tp=2", "parallel.pp=16"),
    ],
)
def test_the_parameters_of_all_stages_are_those_of_the_model(overrides: tuple[str, ...]) -> None:
    cut = layout(*overrides)
    h, t, layers = ARCH.hidden_size, cut.tp, ARCH.num_layers
    replicated = (t - 1) * (2 * h * layers + h)  # the norms are on every tensor-parallel rank
    assert t * sum(parameters_of_stage(ARCH, cut, stage) for stage in range(cut.pp)) - replicated == 72_706_203_648


@pytest.mark.parametrize("name", presets())
def test_one_rank_holds_exactly_the_parameters_of_every_preset(name: str) -> None:
    arch = presets()[name].architecture
    alone = layout(tp=1, pp=1, dp=32, layers_per_stage=(arch.num_layers,), sequence_parallel=False)
    assert parameters_of_stage(arch, alone, 0) == arch.num_parameters


def test_a_tied_output_layer_on_a_stage_of_its_own_is_a_copy() -> None:
    tied = replace(ARCH, tie_word_embeddings=True)
    cut = layout()
    assert parameters_of_stage(tied, cut, 3) == parameters_of_stage(ARCH, cut, 3)
    alone = layout(tp=1, pp=1, layers_per_stage=(80,))
    assert parameters_of_stage(ARCH, alone, 0) - parameters_of_stage(tied, alone, 0) == ARCH.vocab_size * 8192


def test_the_layout_of_the_example_needs_what_was_measured_for_it() -> None:
    """Static bytes and activations of the design's own measurements on meta devices, in GiB."""
    first = memory_of_stages(ARCH, layout())[0]
    assert first.static / GIB == pytest.approx(39.4, abs=0.05)
    assert (first.static + first.activations) / GIB == pytest.approx(51.0, abs=0.3)
    wide = memory_of_stages(ARCH, layout("parallel.tp=4", "parallel.pp=8"))[0]
    assert wide.static / GIB == pytest.approx(42.0, abs=0.05)
    assert (wide.static + wide.activations) / GIB == pytest.approx(65.1, abs=0.3)


def test_optimizer_state_is_shared_by_data_and_context_parallel_ranks_where_it_is_distributed() -> None:
    whole = memory_of_stages(ARCH, layout("parallel.pp=2", "parallel.distributed_optimizer=false"))[0]
    halved = memory_of_stages(ARCH, layout("parallel.pp=2"))[0]
    assert halved.optimizer == whole.optimizer // 2
    by_context = memory_of_stages(ARCH, layout("parallel.pp=2", "parallel.cp=2"))[0]
    assert by_context.optimizer == halved.optimizer and by_context.activations < halved.activations


@pytest.mark.parametrize(
    ("dtype", "moments", "count"), [("bf16", "fp32", 12), ("fp32", "fp32", 8), ("bf16", "bf16", 8)]
)
def test_bytes_of_optimizer_state_follow_from_the_formats(dtype: Any, moments: Any, count: int) -> None:
    assert optimizer_bytes_per_parameter(layout(dtype=dtype, moments_dtype=moments)) == count


def test_what_is_offloaded_leaves_the_gpu_and_is_found_on_the_host() -> None:
    there, moved = memory_of_stages(ARCH, layout())[0], memory_of_stages(ARCH, layout(offload_ratio=0.5))[0]
    assert moved.optimizer + moved.host == there.optimizer and moved.host == there.optimizer // 2


def test_the_first_stage_holds_one_micro_batch_more_than_the_next() -> None:
    held = [layers_in_flight(layout(), stage) for stage in range(4)]
    assert held == [80, 60, 40, 20]
    assert [layers_in_flight(layout(micro_batches=2), stage) for stage in range(4)] == [40, 40, 40, 20]


def test_interleaving_holds_more_and_never_more_than_there_is() -> None:
    plain, interleaved = layout(), layout("parallel.vpp=5")
    assert layers_in_flight(interleaved, 0) == (2 * 3 + 4 * 4 + 1) * 4 > layers_in_flight(plain, 0)
    assert layers_in_flight(replace(interleaved, micro_batches=4), 0) == 80


def test_recomputation_trades_memory_in_order() -> None:
    none, mlp, full = (
        activation_bytes_of_layer(ARCH, layout(recompute=kind, recompute_modules=modules))
        for kind, modules in (("none", ()), ("selective", ("mlp",)), ("full", ()))
    )
    assert full == 2 * 4096 * 8192 / 8  # its input alone
    assert full < mlp < none
    core = activation_bytes_of_layer(ARCH, layout(recompute="selective", recompute_modules=("core_attn",)))
    assert core == none  # attention that never holds the scores has nothing to save


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"seq_length": 2048}, {}),
        ({}, {"micro_batch_size": 2}),
        ({}, {"sequence_parallel": False}),
        ({}, {"attention": "unfused"}),
        ({"dtype": "bf16"}, {"dtype": "fp32"}),
        ({}, {"dropout": 0.1}),
    ],
)
def test_memory_moves_the_right_way(less: dict[str, Any], more: dict[str, Any]) -> None:
    smaller, larger = (worst_stage(memory_of_stages(ARCH, layout(**changes))) for changes in (less, more))
    assert smaller.live < larger.live


@pytest.mark.parametrize("narrow", [1, 2, 4])
def test_more_tensor_parallelism_never_needs_more_per_rank(narrow: int) -> None:
    few, many = (
        worst_stage(memory_of_stages(ARCH, layout(tp=tp, dp=8 // tp, sequence_parallel=tp > 1)))
        for tp in (narrow, 2 * narrow)
    )
    assert many.live < few.live and many.weights < few.weights
