"""`phases`: which token belongs to which, the rates over their borders, their sums, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.derive import derive
from megatron_cpt.config.learning_rate import learning_rate
from megatron_cpt.config.load import build_config
from megatron_cpt.config.phases import phase_at, sample_rates
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import needed_tokens
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.phase_budgets import with_token_budgets
from megatron_cpt.errors import ConfigError
from tests.synthetic_data import random_documents, write_dataset

STEP = 4 * 128
TRAIN = [{"name": "code", "prefix": "c"}, {"name": "text", "prefix": "t", "role": "replay"}]
THREE: list[dict[str, Any]] = [
    {
        "name": "foundation",
        "train_tokens": 10 * STEP,
        "seq_length": 64,
        "data": {"shares": {"code": "60 %", "text": 0.4}},
    },
    {"name": "evolution", "train_tokens": 6 * STEP, "rate": {"course": "rewarm", "lr": 2e-5, "warmup_tokens": STEP}},
    {"name": "mastery", "train_tokens": 4 * STEP, "global_batch_size": 8, "rate": {"course": "anneal", "min_lr": 0}},
]


def config_of(phases: list[dict[str, Any]] = THREE, **sections: Any) -> RunConfig:
    raw = {
        "job_name": "job",
        "model": {"init_from": "x"},
        "batch": {"seq_length": 128, "global_batch_size": 4},
        "budget": {"warmup_tokens": STEP},
        "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
        "data": {"train": TRAIN},
        "phases": phases,
    }
    return build_config(raw | sections)


def test_the_budget_is_the_sum_and_a_token_belongs_to_one_phase() -> None:
    config = config_of()
    assert config.budget.train_tokens == 20 * STEP
    derive(config)
    names = [phase_at(config, step * STEP).name for step in range(22)]
    assert names == ["foundation"] * 10 + ["evolution"] * 6 + ["mastery"] * 6
    shapes = [(p.seq_length, p.batch_size.full) for p in (phase_at(config, n * STEP) for n in (0, 10, 16))]
    assert shapes == [(64, 4), (128, 4), (128, 8)]
    assert config.steps().train_iters == 20 + 6 + 2
    assert phase_at(config, 0).end_tokens == 10 * STEP and phase_at(config, 19 * STEP).end_tokens == 21 * STEP
    assert {name: float(share) for name, share in phase_at(config).mix[0].first.items()} == {"code": 0.6, "text": 0.4}
    assert phase_at(config, 11 * STEP).mix == config.data.mix()


def test_a_step_over_the_border_shortens_the_next_phase_not_the_run() -> None:
    phases = [{"name": "a", "train_tokens": STEP // 2 * 3}, {"name": "b", "train_tokens": STEP // 2 * 3}]
    config = config_of(phases)
    assert [phase_at(config, n * STEP).name for n in range(3)] == ["a", "a", "b"]
    assert (config.steps().train_iters, config.steps().train_tokens) == (3, 3 * STEP)


def test_rates_meet_at_the_borders() -> None:
    config = config_of()
    ends = [10 * STEP, 16 * STEP, 20 * STEP]
    rate = {tokens: learning_rate(phase_at(config, tokens), tokens) for tokens in range(0, 20 * STEP, STEP // 4)}
    before = learning_rate(phase_at(config, 0), ends[0])
    assert before > 2e-5 > 1e-5  # rewarm from a higher rate starts at its own peak
    assert rate[ends[0]] == 2e-5 and learning_rate(phase_at(config, ends[0]), ends[1]) == pytest.approx(1e-5)
    assert rate[ends[1]] == pytest.approx(1e-5)  # anneal goes on from there
    assert learning_rate(phase_at(config, ends[1]), phase_at(config, ends[1]).end_tokens) == pytest.approx(0.0)
    low = config_of([THREE[0], THREE[1] | {"rate": {"course": "rewarm", "warmup_tokens": 2 * STEP}}])
    start = learning_rate(phase_at(low, 0), ends[0])
    warm = [learning_rate(phase_at(low, tokens), tokens) for tokens in (ends[0], 11 * STEP, 12 * STEP)]
    assert warm == pytest.approx([start, (start + 1e-4) / 2, 1e-4])
    assert sample_rates(config, 0, 3)[0] == (0, 0.0) and len(sample_rates(config, 0, 11)) == 11


def test_a_schedule_of_a_phase_counts_from_its_beginning() -> None:
    points = [{"tokens": 0, "domain": "50 %"}, {"tokens": 2 * STEP, "domain": "90 %"}]
    config = config_of([THREE[0], THREE[1] | {"data": {"schedule": {"points": points}}}])
    pieces = phase_at(config, 10 * STEP).mix
    assert [(piece.start_tokens, piece.end_tokens) for piece in pieces] == [(10 * STEP, 12 * STEP), (12 * STEP, None)]
    assert pieces[0].shares_at(11 * STEP)["code"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_tokens": None}, "has no budget"),
        ({"epochs": {"source": "code", "count": 1}}, "in tokens and one in epochs"),
        ({"train_tokens": None, "epochs": {"source": "code", "count": 1}}, "the dataset is not here"),
        ({"name": "mastery"}, "two phases are named 'mastery'"),
        ({"seq_length": 256}, "for which memory is planned"),
        ({"global_batch_size": 3}, "must be a multiple of micro_batch_size x dp"),
        ({"seq_length": 31}, "context parallelism"),
        ({"data": {"replay_ratio": 0.5, "shares": {"code": 1}}}, "says the blend in several ways"),
        ({"data": {"shares": {"code": 0.9}}}, "sum to 0.9"),
        ({"data": {"shares": {"coed": 1}}}, "did you mean code"),
        ({"data": {"schedule": {"points": [{"tokens": 0}]}}}, "needs either domain or shares"),
        ({"rate": {"lr": 1e-5}}, "means nothing to course 'continue'"),
        ({"rate": {"course": "anneal", "lr": 1e-5}}, "means nothing to course 'anneal'"),
        ({"rate": {"course": "anneal", "shape": "constant"}}, "does not anneal"),
        ({"rate": {"course": "rewarm", "lr": 1e-6}}, "is above the peak"),
        ({"rate": {"course": "rewarm", "warmup_tokens": "1M"}}, "exceeds the phase's"),
    ],
)
def test_phases_that_contradict_themselves_are_refused(changes: dict[str, Any], words: str) -> None:
    parallel = {"gpus_per_node": 4, "cp": 2} if words in ("context parallelism",) or "multiple" in words else {}
    config = config_of([THREE[0] | changes, THREE[2] | {"global_batch_size": 4}], parallel=parallel)
    with pytest.raises(ConfigError) as refused:
        derive(config)
    assert words in str(refused.value)


def test_a_budget_that_is_not_the_sum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the phases add up to 10,240\n.*leave it out, or 10,240"):
        derive(config_of(budget={"train_tokens": 10000, "warmup_tokens": 0}))


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([16, 64, 128])), min_size=1, max_size=5),
    st.integers(0, 9000),
)
@settings(max_examples=100, deadline=None)
def test_whatever_the_budgets_the_needs_are_those_of_the_steps(budgets: list[tuple[int, int]], consumed: int) -> None:
    phases = [
        {
            "name": f"p{number}",
            "train_tokens": tokens,
            "seq_length": length,
            "data": {"shares": {"code": 0.6, "text": 0.4}},
        }
        for number, (tokens, length) in enumerate(budgets)
    ]
    config = config_of(phases, budget={"warmup_tokens": 0})
    ledger, iters = Ledger(samples=0, tokens=consumed), 0
    needed = sum(needed_tokens(config, ledger).values())
    steps, position = config.steps(consumed), consumed
    while position < config.budget.train_tokens:  # as the loop does
        phase = phase_at(config, position)
        position += phase.batch_size.at(position) * phase.seq_length
        iters += 1
    assert (iters, position) == (steps.train_iters, steps.train_tokens)
    assert abs(needed - (position - consumed)) <= 128 * (len(phases) + 1)


def test_epochs_of_a_source_become_tokens(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "code", random_documents(60, 100, seed=1))
    train = [{"name": "code", "prefix": str(manifest)}, TRAIN[1]]
    asked = THREE[0] | {"train_tokens": None, "epochs": {"source": "code", "count": 2}, "seq_length": None}
    config = with_token_budgets(config_of([asked, THREE[1]], data={"train": train}))
    tokens = config.phases[0].train_tokens
    assert tokens is not None and tokens % STEP == 0 and config.phases[0].epochs is None
    assert config.budget.train_tokens == tokens + 6 * STEP
    from megatron_cpt.corpus.dataset.manifest import read_manifest

    epoch = (read_manifest(manifest).token_count - 1) // 128 * 128
    assert 0 <= 0.6 * tokens - 2 * epoch < STEP
    assert with_token_budgets(build_config(config.model_dump(mode="json"))) == build_config(
        config.model_dump(mode="json")
    )
    for changes, words in (
        ({"epochs": {"source": "coed", "count": 1}}, "no source of data.train"),
        ({"data": {"shares": {"text": 1}}}, "its share is 0"),
        (
            {"data": {"schedule": {"points": [{"tokens": 0, "domain": 0.5}, {"tokens": 99, "domain": 1}]}}},
            "not constant",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            with_token_budgets(config_of([asked | changes, THREE[1]], data={"train": train}))
