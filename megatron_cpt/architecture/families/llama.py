"""Llama 2, 3 and 3.x (llama3 rope scaling), and models that use its class, such as SmolLM2."""

from __future__ import annotations

from typing import Any

from megatron_cpt.architecture.families.family import LLAMA_LAYER, Config, Family, refuse


def facts(config: Config) -> dict[str, Any]:
    refuse(config, "attention_bias", "it adds a bias to the attention output, which is not supported")
    return {}


DEFAULTS: Config = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
FAMILY = Family(name="llama", hf_class="LlamaForCausalLM", layer=LLAMA_LAYER, facts=facts, defaults=DEFAULTS)
