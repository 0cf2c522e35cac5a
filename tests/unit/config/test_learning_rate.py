from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.derive import derive
from megatron_cpt.config.learning_rate import learning_rate
from megatron_cpt.config.load import build_config
from megatron_cpt.config.phases import draw_rates, phase_at, sample_rates
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

TOTAL, WARMUP, LR, MIN = 1024 * 1000, 1024 * 100, 1e-4, 1e-5


def config(kind: str, warmup: int = WARMUP, **schedule: Any) -> RunConfig:
    return build_config(
        {
            "job_name": "t",
            "model": {"init_from": "m"},
            "batch": {"global_batch_size": 1},
            "budget": {"train_tokens": TOTAL, "warmup_tokens": warmup},
            "optimizer": {"lr": LR, "min_lr": MIN},
            "schedule": {"kind": kind, **schedule},
        }
    )


INFINITE = {"constant_lr": 4e-5, "cooldown_tokens": TOTAL // 5, "decay_tokens": TOTAL // 10}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("inverse_sqrt", {}),
    ("wsd", {"decay_shape": "linear"}),
    ("wsd", {"decay_shape": "cosine"}),
    ("wsd", {"decay_shape": "1-sqrt", "decay_tokens": TOTAL // 4}),
    ("infinite", INFINITE),
]


@pytest.mark.parametrize(("kind", "extra"), KINDS)
def test_each_kind_warms_up_peaks_once_and_ends_at_its_own_rate(kind: str, extra: dict[str, Any]) -> None:
    run = config(kind, **extra)
    derive(run)
    rates = [learning_rate(phase_at(run), t) for t in range(0, TOTAL + 1, TOTAL // 1000)]
    assert rates[0] == 0
    assert rates[50] == pytest.approx(LR / 2)
    assert max(rates) == pytest.approx(LR)
    after = rates[100:]
    assert all(late <= early + 1e-15 for early, late in itertools.pairwise(after))
    end = {"constant": LR, "inverse_sqrt": LR * math.sqrt(WARMUP / TOTAL)}.get(kind, MIN)
    assert rates[-1] == pytest.approx(end)


def test_the_rate_is_right_at_points_computed_by_hand() -> None:
    middle = WARMUP + (TOTAL - WARMUP) // 2
    assert learning_rate(phase_at(config("cosine")), middle) == pytest.approx((LR + MIN) / 2)
    assert learning_rate(phase_at(config("linear")), middle) == pytest.approx((LR + MIN) / 2)
    wsd = config("wsd", decay_shape="1-sqrt", decay_tokens=TOTAL // 4)
    assert learning_rate(phase_at(wsd), TOTAL * 0.75) == LR
    assert learning_rate(phase_at(wsd), TOTAL * 0.8125) == pytest.approx(MIN + (LR - MIN) * 0.5)
    infinite = config("infinite", **INFINITE)
    assert learning_rate(phase_at(infinite), TOTAL // 2) == pytest.approx(4e-5)
    assert learning_rate(phase_at(infinite), TOTAL * 0.95) == pytest.approx(math.sqrt(4e-5 * MIN))
    assert learning_rate(phase_at(config("constant", warmup=0)), 0) == LR


def test_re_warm_starts_the_schedule_anew_at_its_start() -> None:
    start = TOTAL // 2
    run = config("cosine", start_tokens=start, warmup_from_lr=MIN)
    assert learning_rate(phase_at(run), start) == pytest.approx(MIN)
    assert learning_rate(phase_at(run), start + WARMUP) == pytest.approx(LR)
    assert learning_rate(phase_at(run), TOTAL) == pytest.approx(MIN)


@given(st.integers(0, TOTAL), st.sampled_from(KINDS))
def test_layout_seed_and_batch_size_do_not_enter_the_rate(consumed: int, kind: tuple[str, dict[str, Any]]) -> None:
    run = config(kind[0], **kind[1])
    other = run.model_copy(update={"seed": 99, "batch": run.batch.model_copy(update={"global_batch_size": 8})})
    assert learning_rate(phase_at(run), consumed) == learning_rate(phase_at(other), consumed)


@pytest.mark.parametrize(
    ("kind", "extra", "path"),
    [
        ("infinite", {}, "schedule.constant_lr"),
        ("infinite", {"constant_lr": 1.0}, "schedule.constant_lr"),
        ("infinite", {**INFINITE, "cooldown_tokens": TOTAL}, "schedule.decay_tokens"),
        ("cosine", {"decay_tokens": 1024}, "schedule.decay_tokens"),
        ("cosine", {"constant_lr": 2e-5}, "schedule.constant_lr"),
        ("wsd", {"cooldown_tokens": 5}, "schedule.cooldown_tokens"),
        ("wsd", {"decay_tokens": TOTAL}, "schedule.decay_tokens"),
        ("cosine", {"start_tokens": TOTAL}, "schedule.start_tokens"),
        ("cosine", {"start_tokens": TOTAL - 1024}, "budget.warmup_tokens"),
        ("cosine", {"warmup_from_lr": 1.0}, "schedule.warmup_from_lr"),
        ("inverse_sqrt", {"warmup": 0}, "budget.warmup_tokens"),
    ],
)
def test_impossible_schedules_are_refused(kind: str, extra: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        derive(config(kind, **extra))


def ramped(first: int | None, tokens: int, full: int = 32, budget: int = 64_000, **parallel: Any) -> RunConfig:
    return build_config(
        {
            "job_name": "t",
            "model": {"init_from": "m"},
            "batch": {"seq_length": 10, "global_batch_size": full, "rampup_from": first, "rampup_tokens": tokens},
            "budget": {"train_tokens": budget, "warmup_tokens": 0},
            "parallel": parallel,
        }
    )


@given(
    st.sampled_from([(8, 32), (4, 32), (1, 7), (5, 5), (None, 16)]),
    st.integers(1, 100_000),
    st.integers(1_000, 100_000),
)
def test_the_batch_ramps_up_and_the_plan_counts_its_steps(
    sizes: tuple[int | None, int], tokens: int, budget: int
) -> None:
    first, full = sizes
    run = ramped(first, tokens if first else 0, full, budget)
    derived = derive(run)
    consumed, seen = 0, []
    while consumed < budget:
        seen.append(phase_at(run, consumed).batch_size.at(consumed))
        consumed += seen[-1] * 10
    assert (len(seen), consumed) == (derived.train_iters, derived.train_tokens)
    assert seen == sorted(seen)
    assert all(size % (first or full) == 0 and size <= full for size in seen)


def test_the_ramp_rises_at_equal_distances() -> None:
    run = ramped(8, 9_000)
    assert [run.batch.size.at(t) for t in (0, 2_999, 3_000, 5_999, 6_000, 8_999, 9_000, 50_000)] == [
        8,
        8,
        16,
        16,
        24,
        24,
        32,
        32,
    ]


@pytest.mark.parametrize(
    ("first", "tokens", "parallel", "path"),
    [
        (7, 1000, {}, "batch.rampup_from"),
        (4, 0, {}, "batch.rampup_from"),
        (None, 1000, {}, "batch.rampup_tokens"),
        (4, 1000, {"gpus_per_node": 8}, "batch.rampup_from"),
    ],
)
def test_impossible_ramps_are_refused(first: int | None, tokens: int, parallel: dict[str, int], path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        derive(ramped(first, tokens, **parallel))


def test_the_drawing_shows_the_shape() -> None:
    drawn = draw_rates(config("wsd", decay_tokens=TOTAL // 2), 0, columns=11)
    assert drawn == " █████▇▅▄▂▁"
    assert sample_rates(config("constant", warmup=0), 0, 3) == [(0, LR), (TOTAL // 2, LR), (TOTAL, LR)]
