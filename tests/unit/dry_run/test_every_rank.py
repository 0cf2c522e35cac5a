"""Every rank of a layout fits together, and each kind of fault that is planted in one of them is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.dry_run import every_rank
from megatron_cpt.dry_run.every_rank import DryRun, dry_run
from megatron_cpt.dry_run.fake_world import Place, as_rank, prepare_process
from megatron_cpt.dry_run.kernels import modules_of_a_gpu
from megatron_cpt.dry_run.rank import BuiltRank, build_rank, known_storages, note_rank
from megatron_cpt.dry_run.schedule import enough_micro_batches, run_step
from megatron_cpt.model.spec import LayerModules
from megatron_cpt.train.state import TrainState
from tests.unit.dry_run.conftest import QWEN3, tiny

Change = Callable[[BuiltRank], BuiltRank]

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parallel, other sections
    "one rank": ({}, {}),
    "tp2 pp2": ({"tp": 2, "pp": 2}, {}),
    "tp2 dp2, distributed": ({"tp": 2, "gpus_per_node": 4}, {}),
    "tp2 dp2, flat buffers": (
        {"tp": 2, "gpus_per_node": 4},
        {"checkpoint": {"optimizer_sharding": "dp_reshardable"}},
    ),
    "tp2 dp2, replicated": ({"tp": 2, "gpus_per_node": 4, "distributed_optimizer": False}, {}),
    "dp3, overlapped": (
        {"gpus_per_node": 3, "overlap_grad_reduce": True, "overlap_param_gather": True},
        {"batch": {"global_batch_size": 15}},
    ),
    "pp2 vpp2": ({"pp": 2, "vpp": 2}, {}),
    "cp2 tp2": ({"cp": 2, "tp": 2}, {}),
    "pp2, uneven": ({"pp": 2, "last_stage_layers": 1}, {}),
    "pp4, fp32, full recomputation": (
        {"pp": 4},
        {"precision": {"dtype": "fp32"}, "recompute": {"granularity": "full"}},
    ),
    "documents apart": ({"tp": 2}, {"model": {"init_from": "random", "document_attention": True}}),
    "unfused, dropout": ({"pp": 2}, {"model": {"attention": "unfused", "dropout": 0.1}}),
    "levers of a GPU": (
        {"pp": 2},
        {"optimizer": {"cpu_offload_ratio": 0.5, "moments_dtype": "bf16"}, "model": {"attention": "te"}},
    ),
}


def result(parallel: dict[str, Any], facts: dict[str, Any] | None = None, **sections: Any) -> DryRun:
    return dry_run(*tiny(parallel, facts, **sections))


def messages(found: DryRun) -> list[str]:
    return [fault.message for fault in found.faults]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("facts", [{}, {**QWEN3, "tie_word_embeddings": True}], ids=["untied", "tied"])
def test_the_ranks_of_a_layout_fit_together(name: str, facts: dict[str, Any]) -> None:
    parallel, sections = LAYOUTS[name]
    config, arch, derived = tiny(parallel, facts, **sections)
    seen: list[tuple[int, int]] = []
    found = dry_run(config, arch, derived, lambda done, total: seen.append((done, total)))
    assert found.faults == ()
    assert found.parameters == arch.num_parameters
    assert found.ranks == derived.world_size == len(seen) and seen[-1] == (found.ranks, found.ranks)
    assert found.max_rank_bytes == max(stage.peak for stage in found.stages) > 0
    assert [stage.layers for stage in found.stages] == list(derived.layers_per_stage or ())
    assert (found.messages > 0) == (config.parallel.pp > 1)
    assert not torch.distributed.is_initialized()


def of_rank(number: int, change: Change) -> Callable[..., BuiltRank]:
    """`note_rank` whose result for one rank is changed."""

    def note(state: TrainState, place: Place, asked: Any, terms: Any) -> BuiltRank:
        noted = note_rank(state, place, asked, terms)
        return change(noted) if place.rank == number else noted

    return note


def without(key: str, *, optimizer: bool = False) -> Change:
    prefix = "optimizer.state.exp_avg." if optimizer else ""
    return lambda rank: replace(rank, saved=tuple(shard for shard in rank.saved if shard.key != prefix + key))


FC2 = "decoder.layers.mlp.linear_fc2.weight"


def as_its_neighbour(rank: BuiltRank) -> BuiltRank:
    """The part that tensor-parallel rank 0 saves as well."""
    return replace(
        rank,
        saved=tuple(s._replace(offset=(*s.offset[:-1], 0)) if s.key == FC2 else s for s in rank.saved),
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(FC2), f"{FC2}: 8,192 of 32,768 elements are written by no rank, the first of them at index 2"),
        (
            without(FC2, optimizer=True),
            f"optimizer.state.exp_avg.{FC2}: 8,192 of 32,768 elements are written by no rank",
        ),
        (as_its_neighbour, f"{FC2}: ranks 2 and 3 both write elements"),
    ],
    ids=["weight dropped", "optimizer state dropped", "weight duplicated"],
)
def test_a_shard_that_one_rank_drops_or_doubles_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Change, expected: str
) -> None:
    """Rank 3 of TP 2 x PP 2: half of each weight of layers 2 and 3."""
    monkeypatch.setattr(every_rank, "note_rank", of_rank(3, change))
    found = result({"tp": 2, "pp": 2})
    assert not found.ok
    assert any(fault.startswith(expected) for fault in messages(found)), found.faults


def test_a_weight_that_no_rank_holds_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = "decoder.final_layernorm.weight"

    def forget(rank: BuiltRank) -> BuiltRank:
        return replace(
            rank,
            weights=tuple(s for s in rank.weights if s.key != norm),
            saved=tuple(s for s in rank.saved if s.key != norm),
        )

    monkeypatch.setattr(every_rank, "note_rank", of_rank(1, forget))
    faults = messages(result({"pp": 2}))
    assert f"{norm}: no rank holds this weight of the model" in faults
    assert any("parameters, config.json describes" in fault for fault in faults)


def test_a_weight_that_is_held_and_not_saved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_rank, "note_rank", of_rank(1, without("output_layer.weight")))
    assert "output_layer.weight: no rank saves this weight" in messages(result({"pp": 2}))


def built_otherwise(
    number: int, change: Callable[[RunConfig, Architecture], tuple[RunConfig, Architecture]]
) -> Callable[..., TrainState]:
    """`build_rank` that builds one rank, as it is called for it, from another config or model."""
    calls = iter(range(10**6))

    def build(config: RunConfig, arch: Architecture, modules: LayerModules | None) -> TrainState:
        if next(calls) == number:
            config, arch = change(config, arch)
        return build_rank(config, arch, modules)

    return build


def test_a_rank_with_another_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is built with a wider MLP: other parameters than its stage, other wholes in the checkpoint."""
    wider = built_otherwise(1, lambda config, arch: (config, replace(arch, ffn_hidden_size=192)))
    monkeypatch.setattr(every_rank, "build_rank", wider)
    faults = messages(result({"tp": 2, "pp": 2}))
    assert any(fault.startswith("rank 1 (tp 1, cp 0, dp 0, pp 0) has other parameters than rank 0") for fault in faults)
    assert any("linear_fc1.weight: rank 1 saves a part of bfloat16 (4, 384, 64)" in fault for fault in faults)


def test_a_model_that_is_another_on_every_rank_is_not_that_of_config_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def wider(config: RunConfig, arch: Architecture, modules: LayerModules | None) -> TrainState:
        return build_rank(config, replace(arch, ffn_hidden_size=192), modules)

    monkeypatch.setattr(every_rank, "build_rank", wider)
    faults = messages(result({"tp": 2}))
    assert any("config.json describes (4, 256, 64)" in fault for fault in faults)
    assert any("parameters, config.json describes" in fault for fault in faults)


def test_stages_that_exchange_other_shapes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage runs shorter sequences: it expects less than the first one sends."""

    def shorter(state: TrainState, config: RunConfig, micro_batches: int, *, on_gpu: bool, terms: Any) -> Any:
        if not state.chunks[0].module.module.pre_process:
            config = config.model_copy(update={"batch": config.batch.model_copy(update={"seq_length": 32})})
        return run_step(state, config, micro_batches, on_gpu=on_gpu, terms=terms)

    monkeypatch.setattr(every_rank, "run_step", shorter)
    faults = messages(result({"pp": 2}))
    assert (
        "stage 0 to stage 1, tensor 1 of a step: bfloat16 (64, 1, 64) is sent, bfloat16 (32, 1, 64) is expected"
        in faults
    )


@pytest.mark.parametrize("parallel", [{"pp": 2}, {"pp": 2, "vpp": 2}, {"pp": 4}], ids=["1f1b", "interleaved", "pp4"])
def test_more_micro_batches_than_are_run_would_hold_no_more(parallel: dict[str, Any]) -> None:
    config, arch, _ = tiny(parallel, batch={"global_batch_size": 32})
    pp = config.parallel.pp
    prepare_process()
    for stage in range(pp):
        peaks = []
        for micro_batches in (pp, enough_micro_batches(32, pp), 32):
            with as_rank(config, stage):
                state = build_rank(config, arch, modules_of_a_gpu(config))
                peaks.append(run_step(state, config, micro_batches, on_gpu=True).peak)
        assert peaks[0] <= peaks[1]
        assert 0 <= peaks[2] - peaks[1] < 64 * 32  # the sums of each micro-batch's loss, some numbers


def test_bytes_of_a_rank_follow_from_its_parameters() -> None:
    config, arch, _ = tiny({"gpus_per_node": 2})
    with as_rank(config, 0) as place:
        state = build_rank(config, arch, modules_of_a_gpu(config))
        held = note_rank(state, place, config.optimizer).bytes
        assert len(known_storages(state)) >= 4
    parameters = arch.num_parameters
    sizes = (held.weights, held.gradients, held.optimizer)  # a buffer aligns each parameter
    assert sizes == pytest.approx((2 * parameters, 4 * parameters, 12 * parameters / 2), rel=0.001)
    assert held.host == 0


def test_moments_of_fewer_bits_and_an_offloaded_optimizer_count_where_they_lie() -> None:
    plain, narrow, offloaded = (
        result({}, optimizer=optimizer).stages[0].static
        for optimizer in ({}, {"moments_dtype": "bf16"}, {"cpu_offload_ratio": 1.0})
    )
    assert narrow.optimizer * 12 == plain.optimizer * 8
    assert (offloaded.optimizer, offloaded.host) == (0, plain.optimizer)
    assert plain.weights == narrow.weights == offloaded.weights
