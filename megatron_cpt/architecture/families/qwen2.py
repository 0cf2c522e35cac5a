"""Qwen2 and Qwen2.5: Llama's decoder with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from megatron_cpt.architecture.families.family import LLAMA_LAYER, QKV_BIAS, Config, Family, qwen_sliding_window


def facts(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_window": qwen_sliding_window(config)}


DEFAULTS: Config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32}
FAMILY = Family(name="qwen2", hf_class="Qwen2ForCausalLM", layer=LLAMA_LAYER + QKV_BIAS, facts=facts, defaults=DEFAULTS)
