"""config.json -> Architecture: both generations of transformers' keys, and no approximation of what we lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.architecture.families import FAMILIES, architecture_from_config, family_of, read_architecture
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import config, write_hf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_there_are_four_families() -> None:
    assert sorted(FAMILIES) == ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_its_own_config(family: str) -> None:
    arch = architecture_from_config(config(family))
    assert family_of(arch) is FAMILIES[family]
    assert (arch.qkv_bias, arch.qk_norm) == {"qwen2": (True, False), "qwen3": (False, True)}.get(family, (False, False))


def test_both_generations_of_keys_mean_the_same() -> None:
    old = config("llama", rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="float16")
    new = config("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}, dtype="float16")
    del new["rope_theta"], new["torch_dtype"]
    assert architecture_from_config(old) == architecture_from_config(new)
    assert architecture_from_config(new).rope_theta == 5e5
    assert architecture_from_config(new).rope_scaling is not None


def test_dtype_missing_in_config_is_read_from_the_weights(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    del settings["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_architecture(folder).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
    ],
)
def test_sliding_window(family: str, changes: dict[str, Any], window: int | None) -> None:
    assert architecture_from_config(config(family, **changes)).sliding_window == window


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"num_experts": 8}, "num_experts"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, "float8"),
        ("llama", {"num_key_value_heads": 3}, "multiple"),
        ("llama", {"hidden_size": 33, "head_dim": None}, "multiple"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("llama", {"num_hidden_layers": "four"}, "num_hidden_layers = 'four'"),
        ("llama", {"vocab_size": 1e999}, "vocab_size = inf"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ("llama", {"rope_scaling": "yarn"}, "not an object"),
        ("llama", {"rope_theta": "big"}, "wrong kind.*'big'"),
        ("llama", {"rope_theta": -5}, "rope_theta = -5"),
        ("llama", {"head_dim": "x"}, "wrong kind"),
    ],
)
def test_what_we_lack_is_refused_by_name(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        architecture_from_config(config(family, **changes))


@pytest.mark.parametrize("changes", [{"model_type": "gpt2"}, {"hidden_act": "gelu"}, {"num_hidden_layers": "four"}])
def test_a_refusal_names_the_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("llama") | changes))
    with pytest.raises(ConversionError) as refused:
        read_architecture(tmp_path)
    assert refused.value.message.startswith(f"{tmp_path}/config.json ")


@pytest.mark.parametrize(("text", "words"), [(None, "no config.json"), ("{", "not valid JSON"), ("[]", "object")])
def test_unreadable_config(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=words):
        read_architecture(tmp_path)
