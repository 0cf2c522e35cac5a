"""Stored targets that a run may not use are one error before anything starts, and `plan` says it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.commands.kl_targets import kl_targets
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError, DataError, UserError
from megatron_cpt.launch.kl_targets import KlTargets, check_targets, targets_path, wanted_targets, write_record
from megatron_cpt.launch.start import load_run
from megatron_cpt.launch.survey import survey
from tests.configs import tiny_run, write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

KL = {"kl": {"weight": 0.5, "offline_top_k": 8}}
TOKENS = 4096


def config_of(folder: Path, **sections: Any) -> RunConfig:
    return build_config(tiny_run(folder, **{"forgetting": KL, **sections}))


def store(folder: Path, **changes: Any) -> KlTargets:
    """What `megatron-cpt kl-targets` leaves beside the dataset, its numbers all 0."""
    run = load_run(config_of(folder), "test").checked
    record = dataclasses.replace(wanted_targets(run, run.datasets.train[0], TOKENS), **changes)
    for ending, size in record.file_bytes.items():
        targets_path(str(folder / "data"), ending).write_bytes(bytes(size))
    write_record(str(folder / "data"), record)
    return record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", seed=1)
    write_dataset(tmp_path / "data", random_documents(80, 128, 1))
    return tmp_path


def check(config: RunConfig) -> None:
    run = load_run(config, "test")
    check_targets(run.checked, run.ledger, run.plans)


def test_those_of_this_run_are_taken_as_far_as_they_reach(folder: Path) -> None:
    store(folder)
    check(config_of(folder))
    check(config_of(folder, budget={"train_tokens": TOKENS // 2}))
    with pytest.raises(ConfigError, match="targets of 4,096 tokens, and the budget reads 8,192") as error:
        check(config_of(folder, budget={"train_tokens": 2 * TOKENS}))
    assert "goes on where they end" in str(error.value.hint)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"init_from": "other"}}, "weights"),
        ({"seed": 7}, "seed: 1234 -> 7"),
        ({"batch": {"seq_length": 128}}, "seq_length: 64 -> 128"),
        ({"forgetting": {"kl": {"offline_top_k": 9}}}, "top_k: 8 -> 9"),
        ({"forgetting": {"kl": {"offline_top_k": 8, "temperature": 2}}}, "temperature: 1.0 -> 2.0"),
        ({"model": {"document_attention": True}}, "document_attention: False -> True"),
    ],
)
def test_those_of_another_base_or_order_are_refused_and_plan_says_so(
    folder: Path, sections: dict[str, Any], said: str
) -> None:
    store(folder)
    if "init_from" in sections.get("model", {}):
        sections = {"model": {"init_from": str(folder / "other")}}
    config = config_of(folder, **sections)
    with pytest.raises(ConfigError, match=said) as error:
        check(config)
    assert "kl-targets" in str(error.value.hint)
    found = [finding.message for finding in survey(config, "test").findings]
    assert error.value.message in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "0123456789abcdef"}, "dataset: '0123456789abcdef' ->"),
        ({"model": {"architecture": {}, "tokenizer": "a" * 64, "weights": None, "branch": None}}, "model: "),
        ({"source": "renamed"}, "source: 'renamed' -> 'data'"),
    ],
)
def test_those_of_another_dataset_or_model_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    store(folder, **changes)
    with pytest.raises(ConfigError, match=said):
        check(config_of(folder))


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda data: targets_path(data, "json").unlink(), ConfigError, "does not exist"),
        (lambda data: targets_path(data, "json").write_text("{"), DataError, "cannot use"),
        (lambda data: targets_path(data, "ids").unlink(), DataError, "has 0 bytes instead of"),
        (lambda data: targets_path(data, "logq").write_bytes(b"1"), DataError, "has 1 bytes instead of"),
    ],
)
def test_damage_is_named(folder: Path, harm: Callable[[str], None], error: type[UserError], said: str) -> None:
    store(folder)
    harm(str(folder / "data"))
    with pytest.raises(error, match=said) as caught:
        check(config_of(folder))
    assert caught.value.hint


def test_the_command_replaces_nothing_unasked(folder: Path) -> None:
    store(folder, seed=7)
    before = targets_path(str(folder / "data"), "json").read_bytes()
    path = write_tiny_run(folder, forgetting=KL)
    with pytest.raises(ConfigError, match="seed: 7 -> 1234"):
        kl_targets.main([str(path)], standalone_mode=False)
    assert targets_path(str(folder / "data"), "json").read_bytes() == before
    with pytest.raises(ConfigError, match="offline_top_k is not set"):
        kl_targets.main([str(path), "forgetting.kl.offline_top_k=null"], standalone_mode=False)
