"""Fisher values that a run may not use are one error before anything starts, and `plan` says it too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.errors import CheckpointError, ConfigError, UserError
from megatron_cpt.launch.fisher import RECORD, FisherRecord, base_identity, check_fisher, check_fisher_job
from megatron_cpt.launch.origin import resolve_origin
from megatron_cpt.launch.preflight import CheckedRun, check_run
from megatron_cpt.launch.survey import survey
from tests.configs import tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, another one, a dataset, and what the estimate of the first one's Fisher values leaves."""
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", seed=1)
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    identity = base_identity(build_config(tiny_run(tmp_path)), resolve_origin(str(tmp_path / "model")))
    (tmp_path / "fisher").mkdir()
    (tmp_path / "fisher" / "__0_0.distcp").write_bytes(b"12345")
    record = FisherRecord(dataclasses.asdict(identity), "data", "", 4, 256, 64, 1234, "", {}, {"__0_0.distcp": 5})
    (tmp_path / "fisher" / RECORD).write_text(json.dumps(record.to_json()))
    return tmp_path


def run_of(folder: Path, model: str = "model") -> CheckedRun:
    ewc = {"strength": 1.0, "fisher": str(folder / "fisher")}
    tree = tiny_run(folder, model={"init_from": str(folder / model)}, forgetting={"ewc": ewc})
    return check_run(build_config(tree), "test")


def test_those_of_the_base_model_are_taken(folder: Path) -> None:
    check_fisher(run_of(folder))


def test_those_of_another_model_are_refused(folder: Path) -> None:
    run = run_of(folder, "other")
    with pytest.raises(ConfigError, match=r"estimated of another model.*\n.*weights") as error:
        check_fisher(run)
    assert "megatron-cpt fisher" in str(error.value.hint)
    (found,) = [finding for finding in survey(run.config, "test").findings if "forgetting.ewc" in finding.message]
    assert found.message == error.value.message and not found.only_here


def test_those_that_are_elsewhere_are_missing_here_only(folder: Path) -> None:
    run = run_of(folder)
    (folder / "fisher").rename(folder / "moved")
    with pytest.raises(ConfigError, match="does not exist"):
        check_fisher(run)
    (found,) = [finding for finding in survey(run.config, "test").findings if "forgetting.ewc" in finding.message]
    assert found.only_here


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda fisher: (fisher / RECORD).unlink(), ConfigError, "no finished Fisher values"),
        (lambda fisher: (fisher / RECORD).write_text("{"), CheckpointError, "cannot use"),
        (lambda fisher: (fisher / RECORD).write_text('{"format": 9}'), CheckpointError, "format 9"),
        (lambda fisher: (fisher / "__0_0.distcp").unlink(), CheckpointError, "is missing"),
        (lambda fisher: (fisher / "__0_0.distcp").write_bytes(b"1234"), CheckpointError, "4 bytes instead of 5"),
    ],
)
def test_damage_is_named(folder: Path, harm: Callable[[Path], None], error: type[UserError], said: str) -> None:
    harm(folder / "fisher")
    with pytest.raises(error, match=said) as caught:
        check_fisher(run_of(folder))
    assert caught.value.hint


def test_an_estimate_that_cannot_be_made_is_refused(folder: Path) -> None:
    config = run_of(folder).config
    data = str(folder / "data")
    with pytest.raises(CheckpointError, match="already"):
        check_fisher_job(config, "test", data, 4, folder / "fisher")
    with pytest.raises(ConfigError, match="which make") as error:
        check_fisher_job(config, "test", data, 10**6, folder / "new")
    blocks = int(str(error.value.hint).split()[1])
    assert check_fisher_job(config, "test", data, blocks, folder / "new").samples == blocks
