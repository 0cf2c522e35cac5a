"""The search lists layouts that are legal, fit, and paste."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.planner.hardware import find_hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import memory_of_stages, worst_stage
from megatron_cpt.planner.plan import TIGHT
from megatron_cpt.planner.search import Found, search, why_not
from megatron_cpt.planner.throughput import Shape, throughput

REPO = Path(__file__).resolve().parents[3]
CONFIG, MODEL = REPO / "examples/qwen2_72b/config.yaml", REPO / "examples/qwen2_72b"
ARCH = read_architecture(MODEL)
H100 = find_hardware("h100-80g")


def load(*overrides: str) -> RunConfig:
    return load_config(CONFIG, (f"model.architecture={MODEL}", *overrides))


@pytest.fixture(scope="module")
def found() -> Found:
    return search(load(), ARCH, H100)


def test_each_layout_found_can_be_pasted_is_legal_fits_and_is_as_fast_as_said(found: Found) -> None:
    assert len(found.best) == 10
    for candidate in found.best:
        pasted = load(*candidate.overrides(load()))
        derive(pasted, ARCH)
        layout = Layout.of(pasted, ARCH)
        assert worst_stage(memory_of_stages(ARCH, layout)).total <= TIGHT * H100.memory_bytes
        assert throughput(Shape.of(ARCH), layout, H100).tokens_per_s == candidate.speed.tokens_per_s
        assert layout.gpus == 32 and layout.tokens_per_step == 256 * 4096


def test_the_best_come_first_and_none_that_was_left_out_is_faster(found: Found) -> None:
    speeds = [candidate.speed.tokens_per_s for candidate in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert found.own is not None and found.own_place is not None
    assert found.own_place > 1 and found.own.speed.tokens_per_s < speeds[0]
    assert f"number {found.own_place} of {found.fitting}" in why_not(found, H100)


def test_a_layout_that_does_not_fit_is_told_so() -> None:
    tight = search(load("parallel.tp=4"), ARCH, H100)
    assert tight.own_place is None
    assert "GiB" in why_not(tight, H100) and "more than is safe" in why_not(tight, H100)


def test_uneven_stages_are_searched_and_help_where_the_head_is_heavy() -> None:
    heavy = replace(ARCH, vocab_size=4 * ARCH.vocab_size, num_layers=16)
    config = load("parallel.nodes=4", "parallel.gpus_per_node=1", "parallel.tp=1", "parallel.pp=4")
    needed = worst_stage(memory_of_stages(heavy, Layout.of(config, heavy))).total
    pipelines = search(config, heavy, replace(H100, memory_bytes=int(1.1 * needed)))
    even = pipelines.own
    assert even is not None and pipelines.best[0].config.parallel.last_stage_layers is not None
    assert pipelines.best[0].speed.tokens_per_s > even.speed.tokens_per_s


def test_gpus_that_fill_no_node_are_refused_with_legal_numbers() -> None:
    with pytest.raises(ConfigError, match="30 GPUs do not fill nodes of 8") as caught:
        search(load(), ARCH, H100, 30)
    assert "24 or 32" in str(caught.value.hint)


def test_where_nothing_fits_nothing_is_listed() -> None:
    none = search(load(), ARCH, replace(H100, memory_bytes=2**30), 8)
    assert none.best == () and none.fitting == 0 and none.legal > 0
