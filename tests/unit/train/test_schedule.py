from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.train.schedule import learning_rate

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
def test_shape(kind: str, extra: dict[str, Any]) -> None:
    run = config(kind, **extra)
    derive(run)
    rates = [learning_rate(run, TOTAL, t) for t in range(0, TOTAL + 1, TOTAL // 1000)]
    assert rates[0] == 0
    assert rates[50] == pytest.approx(LR / 2)
    assert max(rates) == pytest.approx(LR)
    after = rates[100:]
    assert all(late <= early + 1e-15 for early, late in itertools.pairwise(after))
    end = {"constant": LR, "inverse_sqrt": LR * math.sqrt(WARMUP / TOTAL)}.get(kind, MIN)
    assert rates[-1] == pytest.approx(end)


def test_known_points() -> None:
    middle = WARMUP + (TOTAL - WARMUP) // 2
    assert learning_rate(config("cosine"), TOTAL, middle) == pytest.approx((LR + MIN) / 2)
    assert learning_rate(config("linear"), TOTAL, middle) == pytest.approx((LR + MIN) / 2)
    wsd = config("wsd", decay_shape="1-sqrt", decay_tokens=TOTAL // 4)
    assert learning_rate(wsd, TOTAL, TOTAL * 0.75) == LR
    assert learning_rate(wsd, TOTAL, TOTAL * 0.8125) == pytest.approx(MIN + (LR - MIN) * 0.5)
    infinite = config("infinite", **INFINITE)
    assert learning_rate(infinite, TOTAL, TOTAL // 2) == pytest.approx(4e-5)
    assert learning_rate(infinite, TOTAL, TOTAL * 0.95) == pytest.approx(math.sqrt(4e-5 * MIN))
    assert learning_rate(config("constant", warmup=0), TOTAL, 0) == LR


def test_re_warm_starts_the_schedule_anew_at_its_start() -> None:
    start = TOTAL // 2
    run = config("cosine", start_tokens=start, warmup_from_lr=MIN)
    assert learning_rate(run, TOTAL, start) == pytest.approx(MIN)
    assert learning_rate(run, TOTAL, start + WARMUP) == pytest.approx(LR)
    assert learning_rate(run, TOTAL, TOTAL) == pytest.approx(MIN)


@given(st.integers(0, TOTAL), st.sampled_from(KINDS))
def test_only_the_token_counts(consumed: int, kind: tuple[str, dict[str, Any]]) -> None:
    """Layout, seed and batch size do not enter."""
    run = config(kind[0], **kind[1])
    other = run.model_copy(update={"seed": 99, "batch": run.batch.model_copy(update={"global_batch_size": 64})})
    assert learning_rate(run, TOTAL, consumed) == learning_rate(other, TOTAL, consumed)


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
