"""Mistral: Llama's decoder; the first version attends within a sliding window."""

from __future__ import annotations

from typing import Any

from megatron_cpt.architecture.families.family import LLAMA_LAYER, Config, Family, sliding_window


def facts(config: Config) -> dict[str, Any]:
    return {"sliding_window": sliding_window(config)}


DEFAULTS: Config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8}
FAMILY = Family(name="mistral", hf_class="MistralForCausalLM", layer=LLAMA_LAYER, facts=facts, defaults=DEFAULTS)
