"""What is refused before the first step: chat models, untrained weights, a loss that is not transformers'."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.launch.base_model import refuse_instruct_model, sign_of_instruct
from megatron_cpt.launch.origin import resolve_origin
from megatron_cpt.train.start_checks import check_start
from megatron_cpt.train.state import TrainState, build_train_state
from tests.parity.sabotage import SABOTAGES
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("base", tmp_path_factory.mktemp("models"))


def batch(seq_length: int = 32) -> MicroBatch:
    tokens = (torch.arange(seq_length + 1) * 3 % 50).expand(2, -1)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, seq_length),
        "position_ids": torch.arange(seq_length).expand(2, -1),
    }


def build(model_dir: Path, **model: object) -> TrainState:
    return build_train_state(make_config(model_dir, model=model), read_architecture(model_dir))


def test_untrained_weights_are_refused(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"uniform guess costs ln\(vocabulary\) = 6\.238"):
        check_start(build(model_dir), batch(), resolve_origin(str(model_dir)))


def test_untrained_weights_pass_when_the_config_says_so(model_dir: Path) -> None:
    check_start(build(model_dir, check_start=False), batch(), resolve_origin(str(model_dir)))


@pytest.fixture(scope="module")
def trained_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after enough steps on the one batch to know it, as a Hugging Face directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batch()
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(data["tokens"]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained") / "trained"
    model.save_pretrained(folder)
    return folder


def test_trained_weights_pass_and_equal_transformers(trained_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megatron_cpt.train.start_checks"):
        check_start(build(trained_dir), batch(), resolve_origin(str(trained_dir)))
    assert "in transformers" in caplog.text


@pytest.mark.parametrize("sabotage", ["gate_and_up_swapped", "qkv_not_interleaved"])
def test_weights_loaded_wrongly_are_refused(trained_dir: Path, sabotage: str) -> None:
    with SABOTAGES[sabotage]():
        state = build(trained_dir)
    with pytest.raises(CheckpointError, match=r"in transformers on the same weights|uniform guess"):
        check_start(state, batch(), resolve_origin(str(trained_dir)))


def chat_model(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True)
    for name, content in ({"config": {"eos_token_id": 0}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


END_OF_TURN = {"added_tokens": [{"id": 0, "content": "<|endoftext|>"}, {"id": 2, "content": "<|im_end|>"}]}


def test_signs_of_a_chat_model(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "Qwen2.5-7B", tokenizer=END_OF_TURN, tokenizer_config={"chat_template": "x"})
    assert sign_of_instruct(base) is None
    assert "name" in str(sign_of_instruct(chat_model(tmp_path / "Qwen2.5-7B-Instruct")))
    renamed = chat_model(tmp_path / "a", config={"_name_or_path": "meta/Llama-2-7b-chat-hf"})
    assert "name" in str(sign_of_instruct(renamed))
    for where in ("config", "generation_config"):
        folder = chat_model(tmp_path / where, tokenizer=END_OF_TURN, **{where: {"eos_token_id": [2, 0]}})
        assert "<|im_end|>" in str(sign_of_instruct(folder))


def test_chat_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "Tiny-Instruct")
    with pytest.raises(ConfigError, match="looks like an Instruct/Chat model"):
        refuse_instruct_model(make_config(folder), folder)
    refuse_instruct_model(make_config(folder, model={"allow_instruct": True}), folder)
