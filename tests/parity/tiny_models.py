"""Tiny random Hugging Face models, one per family and trait, with values that make a mistake visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,  # not Llama's own 4.0, which Megatron-Core has built in
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_YARN_IN_FULL = _YARN | {"factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.4}
_YARN_IN_FULL |= {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
_NARROW = {"hidden_size": 32, "intermediate_size": 64}
# name -> (family, what differs from _SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral_tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "odd_vocab": ("llama", {"vocab_size": 515}),  # padding rows as soon as TP divides
    # for the training table: small, and enough layers for PP4 x VPP2
    "base": ("qwen2", _NARROW),
    "base_tied": ("qwen3", {**_NARROW, "head_dim": 16, "tie_word_embeddings": True}),
    "deep": ("qwen2", {**_NARROW, "num_hidden_layers": 8}),
    "nine_heads": (
        "llama",
        {"hidden_size": 36, "intermediate_size": 66, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    # what the base models are held near: other weights of the same shapes
    "reference": ("qwen2", _NARROW),
    "reference_odd_vocab": ("llama", {"vocab_size": 515}),
    "reference_tied": ("qwen3", {**_NARROW, "head_dim": 16, "tie_word_embeddings": True}),
    # positions that were stretched
    "base_yarn": ("qwen2", {**_NARROW, "rope_parameters": _YARN}),
    "qwen2_yarn": ("qwen2", {"rope_parameters": _YARN}),
    "llama_tied_yarn": ("llama", {"rope_parameters": _YARN_IN_FULL, "tie_word_embeddings": True}),
}


def hf_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A transformers model in fp32 whose norms and biases are not trivial."""
    family, differences = MODELS[name]
    config_class, model_class = _CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(_SIZES | differences))).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def save_tiny_model(name: str, folder: Path) -> Path:
    """Write the model as a Hugging Face directory; a seed of its own by position in the table."""
    target = folder / name
    hf_model(name, seed=list(MODELS).index(name)).save_pretrained(target)
    return target
