"""`lora`: what may stand there, other trainers' names for it, and what it does not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import Adapters, AllWeights, trainable_of
from megatron_cpt.errors import ConfigError
from tests.configs import tiny_run

QWEN2_72B = Path(__file__).resolve().parents[3] / "examples/qwen2_72b"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(*overrides: str, **sections: Any) -> RunConfig:
    return build_config(tiny_run(Path(), **sections), overrides)


def test_without_a_rank_all_weights_are_trained() -> None:
    arch = read_architecture(QWEN2_72B)
    assert isinstance(trainable_of(config(), arch), AllWeights)
    adapters = trainable_of(config("lora.rank=16", precision={"dtype": "bf16"}), arch)
    assert isinstance(adapters, Adapters)
    h, kv, f = 8192, 1024, 29568
    parameters = 80 * 16 * ((h + h) * 2 + (h + kv) * 2 + (h + f) * 3)
    assert adapters.checkpoint_bytes() == 14 * parameters
    frozen = arch.num_parameters - arch.vocab_size * h
    assert adapters.flops_per_token(0) == pytest.approx(4 * frozen + 6 * parameters)


@pytest.mark.parametrize(
    "given", ["all", "all-linear", "true", "[down_proj,q_proj,k_proj,v_proj,o_proj,up_proj,gate_proj]"]
)
def test_all_targets(given: str) -> None:
    assert config("lora.rank=8", f"lora.targets={given}").lora.targets == ALL


def test_a_recipe_of_another_trainer_loads() -> None:
    recipe = {
        "lora_rank": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.05,
        "use_rslora": True,
        "lora_target": "v_proj,q_proj",
    }
    lora = build_config(tiny_run(Path()) | recipe).lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (64, 128.0, 0.05, True)
    assert lora.targets == ("q_proj", "v_proj")
    assert lora.scale == 16.0
    assert build_config(tiny_run(Path()) | {"lora_r": 8, "lora_target_linear": True}).lora.targets == ALL


def test_the_resolved_config_is_read_back() -> None:
    one = config("lora.rank=8", "lora.targets=[v_proj,q_proj]")
    assert build_config(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.rank=0"], "lora.rank"),
        (["lora.rank=8", "lora.alpha=0"], "lora.alpha"),
        (["lora.rank=8", "lora.targets=[]"], "lora.targets"),
        (["lora.rank=8", "lora.targets=[lm_head]"], "lora.targets"),
        (["lora.rank=8", "lora.targets=[[q_proj]]"], "lora.targets"),
        (["lora.rank=8", "lora.dropout=1"], "lora.dropout"),
        (["lora.rank=8", "lora.target_modules=all"], "lora.targets is the key here"),
    ],
)
def test_bad_values_are_named(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert said in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.alpha=64"], "lora.rank: is missing"),
        (["lora.rank=8", "model.attention=te"], "fuses the norms"),
        (["lora.rank=8", "precision.fp8=hybrid", "precision.dtype=bf16"], "does not go with adapters"),
        (["lora.rank=8", "parallel.tp=16", "parallel.gpus_per_node=16"], "must divide the model's 8 key/value heads"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(config(*overrides), read_architecture(QWEN2_72B), origin="config")
    assert said in caught.value.message
