"""Everything that would stop a start is found at once; what is only absent here is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.config.load import build_config
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path
from megatron_cpt.errors import CheckpointError, CptError, UserError
from megatron_cpt.launch import preflight
from megatron_cpt.launch.start import check_beginning
from megatron_cpt.launch.survey import Survey, raise_findings, survey
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART
from tests.configs import tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    return tmp_path


def survey_of(folder: Path, **sections: Any) -> Survey:
    return survey(build_config(tiny_run(folder, **sections)), "config.yaml")


def wrong(found: Survey) -> list[str]:
    return [finding.message for finding in found.findings if not finding.only_here]


def missing(found: Survey) -> list[str]:
    return [finding.message for finding in found.findings if finding.only_here]


def test_a_run_that_can_start_has_no_findings(inputs: Path) -> None:
    found = survey_of(inputs)
    assert found.findings == ()
    (source,) = found.sources
    assert source.needed_tokens == 4096 and source.epochs_at_end is not None
    assert source.epochs_at_end == pytest.approx(4096 / (source.available_tokens or 1))


def test_what_is_not_here_is_told_apart_from_what_is_wrong(inputs: Path) -> None:
    for path in (bin_path, idx_path, manifest_path):
        path(inputs / "data").unlink()
    architecture = str((inputs / "model").rename(inputs / "elsewhere"))
    found = survey_of(inputs, model={"init_from": str(inputs / "gone"), "architecture": architecture})
    assert wrong(found) == []
    assert any("no such dataset" in message for message in missing(found))
    assert any("gone' does not exist" in message for message in missing(found))
    assert found.sources[0].needed_tokens == 4096 and found.sources[0].epochs_at_end is None


def test_too_many_epochs_are_wrong(inputs: Path) -> None:
    assert any("max_epochs allows 0.5" in message for message in wrong(survey_of(inputs, data={"max_epochs": 0.5})))


def test_a_missing_tracker_is_missing_here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    found = survey_of(inputs, log={"wandb_project": "p", "tensorboard": True})
    assert any("log.tensorboard needs" in m and "log.wandb_project needs" in m for m in missing(found))


@pytest.mark.parametrize("part", [bin_path, idx_path, manifest_path])
def test_half_a_dataset_is_wrong(inputs: Path, part: Any) -> None:
    part(inputs / "data").unlink()
    assert len(wrong(survey_of(inputs))) >= 1


def test_half_a_model_is_wrong(inputs: Path) -> None:
    weights = inputs / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert any("model.safetensors" in message for message in wrong(survey_of(inputs)))
    weights.unlink()
    assert any("no *.safetensors" in message for message in wrong(survey_of(inputs)))


def test_all_that_is_wrong_is_said_at_once_the_config_included(inputs: Path) -> None:
    bin_path(inputs / "data").write_bytes(b"")
    (inputs / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        survey_of(inputs, parallel={"tp": 3, "gpus_per_node": 3}, batch={"seq_length": 4096})
    said = str(caught.value)
    for part in ("attention heads", "positions", "data.bin has 0 bytes", "no *.safetensors", "hint:"):
        assert part in said, said


def test_a_dataset_too_short_for_one_sample_is_wrong(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(1, 128, 1, longest=20))
    assert any("fewer than one sample" in message for message in wrong(survey_of(tmp_path)))


def test_no_training_data_is_wrong(inputs: Path) -> None:
    assert any("nothing to train on" in message for message in wrong(survey_of(inputs, data={"train": []})))


def test_one_finding_is_one_sentence_and_none_is_nothing(inputs: Path) -> None:
    raise_findings([], "config.yaml")
    (inputs / "model" / "model.safetensors").unlink()
    with pytest.raises(CptError, match=r"^no \*.safetensors"):
        raise_findings(list(survey_of(inputs).findings), "config.yaml")


def test_the_kill_switch_keeps_its_exit_code_as_a_start_would(inputs: Path) -> None:
    (inputs / "run").mkdir()
    (inputs / "run" / "KILL").touch()
    with pytest.raises(UserError, match="KILL is there") as caught:
        raise_findings(survey_of(inputs).blocking(strict=False), "config.yaml")
    assert caught.value.exit_code == DO_NOT_RESTART
    (inputs / "run" / "KILL").unlink()
    (inputs / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        raise_findings(survey_of(inputs).blocking(strict=False), "config.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({}, None),
        ({"rotary_percent": 0.5}, "rotary_percent = 0.5"),
        ({"norm_epsilon": 1e-3}, "rms_norm_eps: 0.001 there"),
        ({"apply_layernorm_1p": True}, "gammas of norms minus 1"),
    ],
)
def test_a_megatron_checkpoint_of_another_model_is_no_origin(
    inputs: Path, stored: dict[str, Any], words: str | None
) -> None:
    """Names and shapes do not show it: what Megatron-LM stored beside the weights does, in `plan` as in `train`."""
    convert(open_checkpoint(inputs / "model"), inputs / "ckpt", Options(to="torch_dist"))
    state = torch.load(inputs / "ckpt" / "common.pt", weights_only=False)
    vars(state["args"]).update(stored)
    torch.save(state, inputs / "ckpt" / "common.pt")
    model = {"init_from": str(inputs / "ckpt"), "architecture": str(inputs / "model")}
    found = survey_of(inputs, model=model)
    if words is None:
        assert found.findings == ()
        return
    assert len(wrong(found)) == 1 and words in wrong(found)[0]
    config = build_config(tiny_run(inputs, model=model))
    with pytest.raises(CheckpointError, match=words):
        check_beginning(preflight.check_run(config, "config.yaml"))
