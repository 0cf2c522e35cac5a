"""A config.json made from what Megatron stored, or checked against it; `megatron_fields` says what a field means."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.megatron_fields import FACTS, GAMMA_LESS_ONE, changes_the_model, is_known
from checkpoint_convert.stored_model import HINT, StoredModel
from megatron_cpt.architecture.facts import Architecture, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from megatron_cpt.architecture.families import FAMILIES, architecture_from_config
from megatron_cpt.architecture.families.family import Config
from megatron_cpt.errors import ConversionError

# Megatron-Core stores the factor only; these are constants of its rope scaling.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
NULL_TOKENIZER, _NULL_EOD = "NullTokenizer", "null_tokenizer_eod_id"


def config_from_stored(stored: StoredModel, tokenizer_dir: Path | None) -> Config:
    """A config.json for the model that Megatron stored; ConversionError where that does not suffice.

    The vocabulary comes from the stored `vocab_size`, else from the tokenizer.json of `tokenizer_dir`.
    """
    fields, path = stored.fields, stored.path
    known = _known_facts(stored)
    _refuse_switches(stored, _placeholder(known))  # first: a model of another kind lacks facts for that reason
    missing = [names for name, names in FACTS.items() if name not in known and not name.startswith("q")]
    if missing:
        raise ConversionError(f"{path} does not say {', '.join(n for pair in missing for n in dict.fromkeys(pair))}",
                              hint=HINT)  # fmt: skip
    if known.get("qkv_bias") and known.get("qk_norm"):
        raise ConversionError(f"{path}: no supported family has both add_qkv_bias and qk_layernorm", hint=HINT)
    family = FAMILIES["qwen3" if known.get("qk_norm") else "qwen2" if known.get("qkv_bias") else "llama"]
    config: Config = {
        "model_type": family.name,
        "architectures": [family.hf_class],
        "num_hidden_layers": known["num_layers"],
        "hidden_size": known["hidden_size"],
        "intermediate_size": known["ffn_hidden_size"],
        "num_attention_heads": known["num_attention_heads"],
        "num_key_value_heads": known["num_query_groups"],
        "head_dim": known["head_dim"],
        "vocab_size": _vocab_size(stored, tokenizer_dir),
        "max_position_embeddings": fields.get("max_position_embeddings") or fields.get("seq_length") or 4096,
        "rms_norm_eps": known["rms_norm_eps"],
        "rope_theta": known["rope_theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": known.get("tie_word_embeddings", False),
        "torch_dtype": "float16" if fields.get("fp16") else "bfloat16" if fields.get("bf16", True) else "float32",
    }
    if fields.get("tokenizer_type") == NULL_TOKENIZER:
        eod = fields.get(_NULL_EOD)
        config["eos_token_id"] = config["vocab_size"] - 1 if eod is None else int(_number(stored, (_NULL_EOD,), eod))
    scaling = known.get("rope_scaling")
    if isinstance(scaling, YarnRopeScaling):
        config["rope_scaling"] = {"rope_type": "yarn", **dataclasses.asdict(scaling)}
    elif scaling is not None:
        names = ("factor", *LLAMA3_SCALING)
        config["rope_scaling"] = {"rope_type": "llama3", **{name: getattr(scaling, name) for name in names}}
    return config


def refuse_other_models(stored: Sequence[StoredModel], arch: Architecture) -> None:
    """ConversionError when a stored switch changes the mathematics in a way that our families do not compute."""
    for model in stored:
        _refuse_switches(model, arch)


def stores_gammas_less_one(stored: Sequence[StoredModel]) -> bool:
    """Whether the norms multiply by 1 + what is stored; ConversionError where the descriptions contradict."""
    said = {
        f"{model.path} {name} = {model.fields[name]!r}": bool(model.fields[name])
        for model in stored
        for name in GAMMA_LESS_ONE
        if model.fields.get(name) is not None
    }
    if len(set(said.values())) > 1:
        raise ConversionError(
            f"whether the gammas of norms are stored minus 1 is said in two ways: {', '.join(said)}",
            hint="remove the wrong one: Megatron-LM's --apply-layernorm-1p decides what the job computed",
        )
    return any(said.values())


def check_facts(stored: Sequence[StoredModel], arch: Architecture, config_path: Path) -> None:
    """MismatchError when a stored fact contradicts config.json: names and shapes do not show it all."""
    for model in stored:
        wrong = [
            f"{name}: {value} there, {getattr(arch, name)} in config.json"
            for name, value in _known_facts(model).items()
            if getattr(arch, name) != value
        ]
        if wrong:
            lines = "\n  ".join(wrong)
            raise MismatchError(
                f"{config_path} contradicts {model.path}\n  {lines}",
                hint="is it the config.json of the model that was trained?",
            )


def unknown_fields(stored: Sequence[StoredModel]) -> tuple[str, ...]:
    """What the list of `megatron_fields` does not know, as `name = value`, for the receipt."""
    return tuple(
        f"{name} = {value!r}" for model in stored for name, value in model.fields.items() if not is_known(name)
    )


def _refuse_switches(model: StoredModel, arch: Architecture) -> None:
    wrong = [f"{name} = {value!r}" for name, value in model.fields.items() if changes_the_model(name, value, arch)]
    if wrong:
        raise ConversionError(
            f"{model.path} describes a model that is not supported: {', '.join(wrong)}",
            hint="no supported family computes this: the conversion would give another model, whatever its config.json",
        )


def _placeholder(known: dict[str, Any]) -> Architecture:
    """An architecture with the known head size, for the switches that are compared with it."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1}
    config = {"model_type": "llama", **sizes, "vocab_size": 1, "max_position_embeddings": 1, "rms_norm_eps": 1e-6}
    arch = architecture_from_config(config)
    return replace(arch, head_dim=known.get("head_dim", 1), rope_scaling=known.get("rope_scaling"))


def _known_facts(stored: StoredModel) -> dict[str, Any]:
    """The facts by Architecture's names; fields that were not stored are left out."""
    fields = stored.fields
    known: dict[str, Any] = {}
    for name, names in FACTS.items():
        value = next((fields[key] for key in names if fields.get(key) is not None), None)
        if value is not None:
            known[name] = _number(stored, names, value)
    heads = known.get("num_attention_heads")
    if heads is not None:
        grouped = fields.get("group_query_attention", True)  # Megatron-LM's switch beside the number
        known["num_query_groups"] = (fields.get("num_query_groups") if grouped else None) or heads
    if heads is not None and "head_dim" not in known and "hidden_size" in known:
        known["head_dim"] = known["hidden_size"] // heads
    if fields.get("share_embeddings_and_output_weights") is not None:
        known["tie_word_embeddings"] = bool(fields["share_embeddings_and_output_weights"])
    elif fields.get("untie_embeddings_and_output_weights") is not None:
        known["tie_word_embeddings"] = not fields["untie_embeddings_and_output_weights"]
    if fields.keys() & {"use_rope_scaling", "rope_scaling", "scale_factor"} or _has_yarn(fields):
        known["rope_scaling"] = _rope_scaling(fields)
    return known


def _number(stored: StoredModel, names: tuple[str, ...], value: Any) -> Any:
    """A size or a number as our facts hold it; a list or a text in its place is another model's."""
    if not isinstance(value, (int, float)):
        raise ConversionError(
            f"{stored.path} says {' / '.join(dict.fromkeys(names))} = {value!r}: not one number", hint=HINT
        )
    return float(value) if names[0] in ("layernorm_epsilon", "rotary_base") else value


def yarn_fields(scaling: YarnRopeScaling) -> dict[str, Any]:
    """YaRN by the names of Megatron-LM's command line, and the attention factor by one of our own, exact."""
    stretch = 0.1 * math.log(scaling.factor)  # Megatron-Core multiplies cosines and sines by 1 + mscale * stretch
    return {
        "rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "mscale": (scaling.attention_factor - 1) / stretch if stretch else 1.0,
        "mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": scaling.truncate,
        "yarn_attention_factor": scaling.attention_factor,
    }


def _has_yarn(fields: dict[str, Any]) -> bool:
    return fields.get("position_embedding_type") == "yarn"


def _yarn_scaling(fields: dict[str, Any]) -> YarnRopeScaling:
    """The reverse of `yarn_fields`; ConversionError where one is missing."""
    names = yarn_fields(YarnRopeScaling(2.0, 1, 32.0, 1.0, 1.0, truncate=True)).keys() - {"yarn_attention_factor"}
    missing = sorted(name for name in names if fields.get(name) is None)
    if missing:
        raise ConversionError(
            f"position_embedding_type is yarn, and nothing is said of {', '.join(missing)}", hint=HINT
        )
    factor, stated = float(fields["rotary_scaling_factor"]), fields.get("yarn_attention_factor")
    over, under = (1 + 0.1 * fields[name] * math.log(factor) for name in ("mscale", "mscale_all_dim"))
    return YarnRopeScaling(
        factor,
        int(fields["yarn_original_max_position_embeddings"]),
        float(fields["yarn_beta_fast"]),
        float(fields["yarn_beta_slow"]),
        over / under if stated is None else float(stated),
        bool(fields["yarn_correction_range_round_to_int"]),
    )


def _rope_scaling(fields: dict[str, Any]) -> RopeScaling | None:
    """Megatron-LM's `use_rope_scaling`, Megatron-Bridge's `rope_scaling` or its Llama 3.1 provider's own fields."""
    if _has_yarn(fields):
        return _yarn_scaling(fields)
    bridge_llama = fields.get("scale_factor") is not None
    if not (fields.get("use_rope_scaling") or fields.get("rope_scaling") or bridge_llama):
        return None
    factor = fields.get("scale_factor") if bridge_llama else fields.get("rope_scaling_factor")

    def number(bridge: str, ours: str, default: float) -> float:
        found = fields.get(bridge) if bridge_llama else fields.get(ours)
        return float(default if found is None else found)

    low, high, context = LLAMA3_SCALING.values()
    return Llama3RopeScaling(
        factor=float(8.0 if factor is None else factor),
        low_freq_factor=number("low_freq_factor", "rope_scaling_low_freq_factor", low),
        high_freq_factor=number("high_freq_factor", "rope_scaling_high_freq_factor", high),
        original_max_position_embeddings=int(
            number("old_context_len", "rope_scaling_original_max_position_embeddings", context)
        ),
    )


def _vocab_size(stored: StoredModel, tokenizer_dir: Path | None) -> int:
    """Rows of the embedding without padding."""
    fields = stored.fields
    if fields.get("vocab_size") is not None:
        # Until Megatron-Core 0.17 a NullTokenizer's EOD came after the ids that were asked for; since 0.18, whose args
        # have a name for it, it is among them.
        one_more = fields.get("tokenizer_type") == NULL_TOKENIZER and _NULL_EOD not in fields
        return int(_number(stored, ("vocab_size",), fields["vocab_size"])) + one_more
    if tokenizer_dir is not None:
        return tokenizer_rows(tokenizer_dir / "tokenizer.json")
    padded, kind, name = (fields.get(key) for key in ("padded_vocab_size", "tokenizer_type", "tokenizer_model"))
    raise ConversionError(
        f"{stored.path} does not say vocab_size: {kind or 'a tokenizer'} ({name}) decided it, and is not here; with "
        f"padding it is {padded}",
        hint="give --hf-config DIR with the base model's config.json and tokenizer; the folder of the tokenizer alone "
        "will do (tokenizer.json), and both may also lie beside latest_checkpointed_iteration.txt",
    )


def tokenizer_rows(path: Path) -> int:
    """One more than the largest id of a tokenizer.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens", [])]
        return int(1 + max([*ids, *added]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is not a tokenizer: {error!r}", hint="copy the tokenizer again") from error
