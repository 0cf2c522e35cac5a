"""Other rotary positions: what is written into config.json means to transformers what it means here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from checkpoint_convert.forward import attention_factor, inverse_frequencies
from megatron_cpt.architecture.families import architecture_from_config
from megatron_cpt.architecture.rope import RopeChange, with_rope
from megatron_cpt.errors import ConfigError, ConversionError

SIZES = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4}
OLD: dict[str, Any] = SIZES | {"model_type": "llama", "vocab_size": 77, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
OLD |= {"num_key_value_heads": 4, "max_position_embeddings": 128, "rope_scaling": None}
NEW = {key: value for key, value in OLD.items() if not key.startswith("rope")}
NEW |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
ABF = RopeChange(theta=5e6, max_position_embeddings=1024)
STRETCH = RopeChange(yarn_factor=8.0)
CASES = [
    (OLD, ABF, 1024),
    (NEW, ABF, 1024),
    (OLD | {"rope_scaling": LLAMA3}, ABF, 1024),
    (NEW | {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, ABF, 1024),
    (OLD, STRETCH, 1024),
    (NEW, STRETCH, 1024),
    (NEW, RopeChange(theta=5e5, yarn_factor=8.0, original_max_position_embeddings=64), 512),
    (OLD | {"rope_scaling": YARN}, STRETCH, 1024),  # stretched further, from its first positions
]


def in_transformers(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config)))
    return rope.inv_freq, rope.attention_scaling


@pytest.mark.parametrize(("config", "change", "positions"), CASES)
def test_the_changed_file_means_the_same_to_transformers(
    config: dict[str, Any], change: RopeChange, positions: int
) -> None:
    changed = with_rope(config, change)
    arch, base = architecture_from_config(changed), architecture_from_config(config)
    frequencies, factor = in_transformers(changed)
    torch.testing.assert_close(inverse_frequencies(arch), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(arch) == factor
    assert arch.positions == changed["max_position_embeddings"] == positions
    assert not torch.allclose(inverse_frequencies(base), frequencies, rtol=1e-3)
    assert with_rope(changed, change) == changed


def test_a_model_whose_file_has_yarn_already_has_its_positions() -> None:
    """Model cards tell people to add the scaling and to leave max_position_embeddings as it is."""
    assert architecture_from_config(OLD | {"rope_scaling": YARN}).positions == 256
    assert architecture_from_config(OLD).positions == 128


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (OLD | {"rope_scaling": LLAMA3}, STRETCH, "llama3 rope scaling already"),
        (OLD, RopeChange(theta=1e6, max_position_embeddings=64), "64 positions of its 128"),
        (OLD, RopeChange(yarn_factor=2.0, original_max_position_embeddings=32), "64 positions of its 128"),
    ],
)
def test_a_change_that_does_not_fit_the_model_is_refused(
    config: dict[str, Any], change: RopeChange, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        with_rope(config, change)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        (YARN | {"factor": 0.5}, "below 1"),
        (YARN | {"factor": 1.0, "attention_factor": 1.2}, "attention_factor"),
    ],
)
def test_a_yarn_scaling_that_says_too_little_is_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        architecture_from_config(OLD | {"rope_scaling": scaling})
