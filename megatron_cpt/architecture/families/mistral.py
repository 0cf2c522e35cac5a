"""Mistral: Llama's decoder; the first version attends within a sliding window."""

from __future__ import annotations

from typing import Any

from megatron_cpt.architecture.families.family import LLAMA_LAYER, Config, Family


def facts(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)  # transformers' default; later versions say null
    return {"sliding_window": None if window is None else int(window)}


FAMILY = Family(name="mistral", hf_class="MistralForCausalLM", layer=LLAMA_LAYER, facts=facts)
