"""Which model a Megatron checkpoint is, by what Megatron itself stored: a config.json made or checked from it.

Megatron-Bridge writes `run_config.yaml` into the iteration's folder; its `model` section holds the fields of
Megatron-Core's TransformerConfig. Megatron-LM stores its command line, an argparse.Namespace, as `args` in
`common.pt` (torch_dist) or in each rank's file (legacy). Both name the same facts; neither holds a tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from checkpoint_convert.checkpoint import MismatchError
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import FAMILIES
from megatron_cpt.architecture.families.family import Config
from megatron_cpt.errors import ConversionError

BRIDGE_CONFIG = "run_config.yaml"
HINT = "give --hf-config DIR, the Hugging Face folder of the base model (config.json and tokenizer)"

# Architecture's field -> its name in Megatron-Bridge's `model` section, its name among Megatron-LM's args
FIELDS: dict[str, tuple[str, str]] = {
    "num_layers": ("num_layers", "num_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "ffn_hidden_size": ("ffn_hidden_size", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "head_dim": ("kv_channels", "kv_channels"),
    "rms_norm_eps": ("layernorm_epsilon", "norm_epsilon"),
    "rope_theta": ("rotary_base", "rotary_base"),
    "qkv_bias": ("add_qkv_bias", "add_qkv_bias"),
    "qk_norm": ("qk_layernorm", "qk_layernorm"),
}
# What must hold for a model of our families: field -> allowed values. Absent fields pass.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "gated_linear_unit": (True,),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0, None),
    "num_moe_experts": (None, 0),
    "num_experts": (None, 0),
    "multi_latent_attention": (False, None),
    "rotary_interleaved": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "seq_len_interpolation_factor": (None, 1, 1.0),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "window_size": (None,),
}
# Megatron-Core stores the factor only; these are constants of its rope scaling.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def stored_facts(folder: Path, *, trust_pickle: bool = False) -> tuple[dict[str, Any], Path] | None:
    """Fields by Megatron-LM's or Megatron-Bridge's names and the file that holds them, None when there is none."""
    path = folder / BRIDGE_CONFIG
    if path.is_file():
        return _bridge_facts(path), path
    files = [folder / "common.pt", *sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))[:1]]
    for path in files:
        if path.is_file():
            from checkpoint_convert.state_file import load_state

            args = load_state(path, trust_pickle=trust_pickle).get("args")
            return (dict(vars(args)), path) if args is not None else None
    return None


def _bridge_facts(path: Path) -> dict[str, Any]:
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        nested = model.get("transformer") or {}
        return {**model, **nested}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} has no readable `model` section: {error}", hint=HINT) from error


def config_from_facts(facts: dict[str, Any], path: Path, dtype: str) -> Config:
    """A config.json for the model that Megatron stored; ConversionError where that does not suffice."""
    _refuse_other_models(facts, path)
    known = _known(facts)
    missing = [names for name, names in FIELDS.items() if name not in known and not name.startswith("q")]
    if missing or facts.get("vocab_size") is None:
        names = [name for pair in missing for name in dict.fromkeys(pair)] or ["vocab_size (padding left out)"]
        raise ConversionError(f"{path} does not say {', '.join(names)}", hint=HINT)
    qkv_bias, qk_norm = known.get("qkv_bias", False), known.get("qk_norm", False)
    if qkv_bias and qk_norm:
        raise ConversionError(f"{path}: no supported family has both add_qkv_bias and qk_layernorm", hint=HINT)
    family = FAMILIES["qwen3" if qk_norm else "qwen2" if qkv_bias else "llama"]
    config: Config = {
        "model_type": family.name,
        "architectures": [family.hf_class],
        "num_hidden_layers": known["num_layers"],
        "hidden_size": known["hidden_size"],
        "intermediate_size": known["ffn_hidden_size"],
        "num_attention_heads": known["num_attention_heads"],
        "num_key_value_heads": known["num_query_groups"],
        "head_dim": known["head_dim"],
        "vocab_size": facts["vocab_size"],
        "max_position_embeddings": facts.get("max_position_embeddings") or facts.get("seq_length") or 4096,
        "rms_norm_eps": known["rms_norm_eps"],
        "rope_theta": known["rope_theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": known.get("tie_word_embeddings", False),
        "torch_dtype": dtype,
    }
    if facts.get("use_rope_scaling") or facts.get("rope_scaling"):
        factor = float(facts.get("rope_scaling_factor") or 8.0)
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    return config


def check_facts(facts: dict[str, Any], path: Path, arch: Architecture, side_dir: Path) -> None:
    """Raise MismatchError when config.json contradicts what Megatron stored: names and shapes do not show it all."""
    wrong = [
        f"{name}: {value} there, {getattr(arch, name)} in config.json"
        for name, value in _known(facts).items()
        if getattr(arch, name) != value
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise MismatchError(
            f"{side_dir}/config.json contradicts {path}\n  {lines}", hint="is --hf-config the model that was trained?"
        )


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts by Architecture's names; fields that were not stored are left out."""
    known: dict[str, Any] = {}
    for name, names in FIELDS.items():
        value = next((facts[key] for key in names if facts.get(key) is not None), None)
        if value is not None:
            known[name] = float(value) if name in ("rms_norm_eps", "rope_theta") else value
    heads = facts.get("num_attention_heads")
    if heads is not None:
        grouped = facts.get("group_query_attention", True)  # Megatron-LM's switch beside the number
        known["num_query_groups"] = (facts.get("num_query_groups") if grouped else None) or heads
    if heads is not None and "head_dim" not in known and facts.get("hidden_size") is not None:
        known["head_dim"] = facts["hidden_size"] // heads
    if facts.get("share_embeddings_and_output_weights") is not None:
        known["tie_word_embeddings"] = bool(facts["share_embeddings_and_output_weights"])
    elif facts.get("untie_embeddings_and_output_weights") is not None:
        known["tie_word_embeddings"] = not facts["untie_embeddings_and_output_weights"]
    return known


def _refuse_other_models(facts: dict[str, Any], path: Path) -> None:
    wrong = [f"{k} = {facts[k]!r}" for k, allowed in REQUIRED.items() if k in facts and facts[k] not in allowed]
    activation = facts.get("activation_func")
    if activation is not None and "silu" not in str(activation):
        wrong.append(f"activation_func = {activation!r}")
    if wrong:
        raise ConversionError(f"{path} describes a model that is not supported: {', '.join(wrong)}", hint=HINT)
