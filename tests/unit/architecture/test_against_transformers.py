"""A config.json means to us what it means to transformers, or it is refused: thousands of random ones."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.architecture.facts import Architecture, Llama3RopeScaling, YarnRopeScaling
from megatron_cpt.architecture.families import FAMILIES, architecture_from_config, read_architecture
from megatron_cpt.errors import ConversionError

CASES = 2500
ABSENT = object()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[Any] = [
    ABSENT,
    ABSENT,
    None,
    {},
    {"rope_type": "default", "rope_theta": 20000.0},
    {"rope_theta": 30000},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 40000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3 | {"original_max_position_embeddings": 64},
    LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5},
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64, "type": "linear"},
    LLAMA3,
    {"type": "default", "rope_theta": 7e4},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 1e6},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 5e5, "mscale": 2.0},
    {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "mscale": 2.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "attention_factor": 1.5, "beta_fast": 9},
    {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "truncate": False, "beta_slow": 0.5},
]
KEYS: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [ABSENT, ABSENT, 10000.0, 500000.0, 1000000],
    "partial_rotary_factor": [ABSENT, ABSENT, ABSENT, 1.0, 0.25],
    "num_hidden_layers": [2, 4, 30],
    "hidden_size": [64, 128],
    "intermediate_size": [96, 160],
    "num_attention_heads": [8, 32],
    "num_key_value_heads": [ABSENT, None, 2, 8, 32],
    "head_dim": [ABSENT, ABSENT, None, 16, 128],
    "vocab_size": [77, 1003],
    "max_position_embeddings": [ABSENT, 64, 4096],
    "original_max_position_embeddings": [ABSENT, ABSENT, ABSENT, 128],
    "rms_norm_eps": [ABSENT, 1e-5, 1e-6],
    "tie_word_embeddings": [ABSENT, True, False],
    "attention_bias": [ABSENT, ABSENT, False, True],
    "mlp_bias": [ABSENT, ABSENT, False, True],
    "hidden_act": [ABSENT, "silu", "silu", "gelu"],
    "sliding_window": [ABSENT, None, 32, 4096],
    "use_sliding_window": [ABSENT, False, True],
    "max_window_layers": [ABSENT, 0, 2, 30],
    "layer_types": [ABSENT, ABSENT, ABSENT, "sliding_attention", "full_attention", "mixed"],
    "dtype": [ABSENT, ABSENT, None, "bfloat16"],
    "torch_dtype": [ABSENT, ABSENT, None, "float16"],
}


def random_config(draw: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": draw.choice(list(FAMILIES))}
    for key, values in KEYS.items():
        if (value := draw.choice(values)) is not ABSENT:
            config[key] = copy.deepcopy(value)
    kind, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kind is not None:
        config["layer_types"] = (
            [kind] * layers if kind != "mixed" else ["full_attention", "sliding_attention"] * (layers // 2)
        )
    return config


def as_transformers_reads(config: dict[str, Any]) -> dict[str, Any] | None:
    """The facts by our names; None when transformers refuses the config."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    read_config = copy.deepcopy(config)
    try:
        read = AutoConfig.for_model(read_config.pop("model_type"), **read_config)
    except Exception:
        return None
    rope = read.rope_parameters
    if any(isinstance(value, dict) for value in rope.values()):  # another rope per layer type
        return {"computes what we do not": True}
    head_dim = getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads
    window = getattr(read, "sliding_window", None)
    if config["model_type"] in ("qwen2", "qwen3") and "sliding_attention" not in read.layer_types:
        window = None
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Llama3RopeScaling(
            **{
                key: rope[key]
                for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            }
        )
    if rope["rope_type"] == "yarn":
        read.head_dim = head_dim  # where config.json says null
        scaling = YarnRopeScaling(
            factor=rope["factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            attention_factor=ROPE_INIT_FUNCTIONS["yarn"](read, "cpu")[1],
            truncate=rope.get("truncate", True),
        )
    facts = {
        "num_layers": read.num_hidden_layers,
        "hidden_size": read.hidden_size,
        "ffn_hidden_size": read.intermediate_size,
        "num_attention_heads": read.num_attention_heads,
        "num_query_groups": read.num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": read.vocab_size,
        "max_position_embeddings": read.max_position_embeddings,
        "rms_norm_eps": read.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "tie_word_embeddings": read.tie_word_embeddings,
        "sliding_window": window if config["model_type"] != "llama" else None,
    }
    if read.dtype is not None:
        facts["dtype"] = str(read.dtype).removeprefix("torch.")
    changes = rope["rope_type"] not in ("default", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) not in (
        None,
        1.0,
    )
    changes |= read.hidden_act != "silu"
    changes |= config["model_type"] in ("llama", "qwen3") and bool(read.attention_bias)
    changes |= config["model_type"] == "llama" and bool(read.mlp_bias)
    return facts | {"computes what we do not": changes}


def read_by_us(config: dict[str, Any]) -> Architecture | None:
    try:
        return architecture_from_config(copy.deepcopy(config))
    except ConversionError:
        return None


def test_random_configs_agree_with_transformers_or_are_refused() -> None:
    draw = random.Random(13)
    accepted = refused = 0
    for _ in range(CASES):
        config = random_config(draw)
        ours, theirs = read_by_us(config), as_transformers_reads(config)
        if ours is None:
            refused += 1
            continue
        if theirs is None:  # who cannot be opened by transformers cannot come from it
            continue
        accepted += 1
        assert not theirs.pop("computes what we do not"), config
        assert {name: getattr(ours, name) for name in theirs} == theirs, config
    assert accepted > CASES // 20 and refused > CASES // 20


def test_the_comparison_would_find_the_other_precedence() -> None:
    """A negative control: with `rope_parameters` before `rope_scaling` the two readings differ."""
    config = random_config(random.Random(1)) | {
        "model_type": "llama", "num_attention_heads": 8, "rope_scaling": ROPES[4], "rope_parameters": ROPES[11],
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
        "num_key_value_heads": 8,
    }  # fmt: skip
    theirs = as_transformers_reads(config)
    assert theirs is not None and theirs["rope_scaling"] is None and theirs["rope_theta"] == 20000.0
    turned = config | {"rope_scaling": config["rope_parameters"], "rope_parameters": config["rope_scaling"]}
    ours, other = read_by_us(config), read_by_us(turned)
    assert ours is not None and other is not None
    assert ours.rope_scaling is None and other.rope_scaling is not None


@pytest.mark.parametrize("both", [{"torch_dtype": "auto"}, {"dtype": "auto"}, {}, {"dtype": None}])
def test_a_dtype_that_is_left_to_the_weights_is_read_from_them(tmp_path: Path, both: dict[str, Any]) -> None:
    from tests.unit.convert.tiny_checkpoints import write_hf

    folder = write_hf(tmp_path / "hf", "llama")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")} | both
    (folder / "config.json").write_text(json.dumps(config))
    assert read_architecture(folder).dtype == "bfloat16"
