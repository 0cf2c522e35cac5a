"""Qwen3 dense: Llama's decoder with a norm on each query and key head, and a head_dim of its own."""

from __future__ import annotations

from typing import Any

from megatron_cpt.architecture.families.family import (
    LLAMA_LAYER,
    QK_NORM,
    Config,
    Family,
    qwen_sliding_window,
    refuse,
    require,
)


def facts(config: Config) -> dict[str, Any]:
    refuse(config, "attention_bias", "it adds a bias to the attention output, which is not supported")
    require(config, "head_dim")  # null would be no size to transformers
    return {"qk_norm": True, "sliding_window": qwen_sliding_window(config)}


DEFAULTS: Config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
FAMILY = Family(name="qwen3", hf_class="Qwen3ForCausalLM", layer=LLAMA_LAYER + QK_NORM, facts=facts, defaults=DEFAULTS)
