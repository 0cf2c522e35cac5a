"""A family is a config reader and a name table; everything else follows from these two.

A `TensorRule` of the table names one Megatron tensor, the Hugging Face tensors that it is made of, how they
are joined (`Kind`), its symbolic shape and the dimension that tensor parallelism splits. Layer tables
are written without the layer prefix (`decoder.layers.{i}.` and `model.layers.{i}.`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.rope import rope_facts
from megatron_cpt.errors import ConversionError

Kind = Literal["plain", "qkv", "gated", "vocab"]
Split = Literal["rows", "columns"]
Config = dict[str, Any]  # the content of a config.json

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor. Shape symbols are the keys of `tensors.dimensions`."""

    megatron: str
    kind: Kind
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    _: KW_ONLY
    split: Split | None = None  # what tensor parallelism divides: output rows, input columns, or nothing
    by_heads: bool = False  # it can only be divided between whole attention heads


@dataclass(frozen=True)
class Family:
    """`layer` and `model` are the name tables; `facts` checks a config.json and returns what sets it apart.

    The sizes must be in config.json: a model of which they are left out is not the one that somebody trained.
    """

    name: str  # also `model_type` in config.json
    hf_class: str  # the one entry of `architectures` in config.json
    layer: tuple[TensorRule, ...]
    facts: Callable[[Config], dict[str, Any]]
    defaults: Config  # what transformers takes for keys that config.json may leave out
    model: tuple[TensorRule, ...] = (
        TensorRule(
            "embedding.word_embeddings.weight",
            "vocab",
            ("model.embed_tokens.weight",),
            ("vocab", "hidden"),
            split="rows",
        ),
        TensorRule("decoder.final_layernorm.weight", "plain", ("model.norm.weight",), ("hidden",)),
        TensorRule("output_layer.weight", "vocab", ("lm_head.weight",), ("vocab", "hidden"), split="rows"),
    )


# Rows shared by every decoder of the Llama lineage. The norms carry TransformerEngine's names (fused into the
# linear that follows); Megatron-Core's local spec writes the same names into a torch_dist checkpoint.
LLAMA_LAYER: tuple[TensorRule, ...] = (
    TensorRule("self_attention.linear_qkv.layer_norm_weight", "plain", ("input_layernorm.weight",), ("hidden",)),
    TensorRule(
        "self_attention.linear_qkv.weight",
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ("qkv", "hidden"),
        split="rows",
        by_heads=True,
    ),
    TensorRule(
        "self_attention.linear_proj.weight",
        "plain",
        ("self_attn.o_proj.weight",),
        ("hidden", "q"),
        split="columns",
        by_heads=True,
    ),
    TensorRule("mlp.linear_fc1.layer_norm_weight", "plain", ("post_attention_layernorm.weight",), ("hidden",)),
    TensorRule(
        "mlp.linear_fc1.weight",
        "gated",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("gated_ffn", "hidden"),
        split="rows",
    ),
    TensorRule("mlp.linear_fc2.weight", "plain", ("mlp.down_proj.weight",), ("hidden", "ffn"), split="columns"),
)

QKV_BIAS: tuple[TensorRule, ...] = (
    TensorRule(
        "self_attention.linear_qkv.bias",
        "qkv",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        ("qkv",),
        split="rows",
        by_heads=True,
    ),
)

QK_NORM: tuple[TensorRule, ...] = (
    TensorRule("self_attention.q_layernorm.weight", "plain", ("self_attn.q_norm.weight",), ("head_dim",)),
    TensorRule("self_attention.k_layernorm.weight", "plain", ("self_attn.k_norm.weight",), ("head_dim",)),
)


def require(config: Config, key: str) -> Any:
    if config.get(key) is None:
        raise ConversionError(f"config.json has no {key!r}", hint="is this the config.json of a causal language model?")
    return config[key]


def require_whole(config: Config, key: str) -> int:
    """A size: a whole number above 0."""
    value = require(config, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer() or value < 1:
        raise ConversionError(
            f"config.json says {key} = {value!r}: not a whole number above 0",
            hint="fetch the model's config.json again",
        )
    return int(value)


def refuse(config: Config, key: str, because: str) -> None:
    """Raise when a switch that changes the mathematics is on."""
    if config.get(key):
        raise ConversionError(
            f"config.json asks for {key} = {config[key]!r}: {because}",
            hint="this model cannot be converted without changing what it computes",
        )


def qwen_sliding_window(config: Config) -> int | None:
    """Window in tokens, None when every layer attends to the whole sequence.

    Qwen: off unless `use_sliding_window`; then the layers that `layer_types` names slide, or without it
    those from `max_window_layers` on. A model of which only some layers slide reports the window.
    """
    window = sliding_window(config)
    if window is None or not config.get("use_sliding_window", False):
        return None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return window if "sliding_attention" in layer_types else None
    some_slide = int(config.get("max_window_layers", 28)) < int(require(config, "num_hidden_layers"))
    return window if some_slide else None


def sliding_window(config: Config) -> int | None:
    """The window in tokens, transformers' default of 4096 where config.json does not name one."""
    asked = {"sliding_window": 4096} | config
    return None if asked["sliding_window"] is None else require_whole(asked, "sliding_window")


def stored_dtype(config: Config) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (4); float32 when neither says one."""
    dtype = (named_dtype(config) or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConversionError(f"config.json says dtype {dtype!r}; supported are {', '.join(DTYPES)}")
    return dtype


def named_dtype(config: Config) -> str | None:
    """The dtype that config.json names; None where it leaves it to the weights (absent, null, or `auto`)."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype in (None, "auto") else str(dtype)


def build_architecture(family: Family, config: Config) -> Architecture:
    """All facts of a model, or a ConversionError naming the first one that we would have to approximate."""
    try:
        return _build_architecture(family, config)
    except (TypeError, ValueError, OverflowError) as error:  # a text where a number belongs
        raise ConversionError(
            f"config.json holds a value of the wrong kind: {error}", hint="fetch the model's config.json again"
        ) from error


def _build_architecture(family: Family, config: Config) -> Architecture:
    config = family.defaults | config
    classes = config.get("architectures")
    if classes and classes != [family.hf_class]:
        raise ConversionError(
            f"config.json says architectures {classes}, expected [{family.hf_class!r}]",
            hint="only the family's causal language model can be converted",
        )
    refuse(config, "quantization_config", "quantised weights have no exact full-precision form")
    refuse(config, "per_layer_config", "layers that differ in their configuration are not supported")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        refuse(config, key, "mixture-of-experts models are not supported")
    refuse(config, "mlp_bias", "biases in the MLP are not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConversionError(f"config.json asks for hidden_act {activation!r}: only silu is supported")
    hidden, heads = require_whole(config, "hidden_size"), require_whole(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else require_whole(config, "num_key_value_heads")
    if heads % groups:
        raise ConversionError(f"config.json has {heads} attention heads, not a multiple of {groups} key/value heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ConversionError(f"config.json has hidden_size {hidden}, not a multiple of {heads} heads, and no head_dim")
    eps = require(config, "rms_norm_eps")
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise ConversionError(
            f"config.json says rms_norm_eps = {eps!r}: not a small number above 0", hint="fetch it again"
        )
    theta, scaling = rope_facts(config)
    facts: dict[str, Any] = {"qkv_bias": False, "qk_norm": False, "sliding_window": None}
    return Architecture(
        family=family.name,
        num_layers=require_whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=require_whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads
        if config.get("head_dim") is None
        else require_whole({"head_dim": int(config["head_dim"])}, "head_dim"),
        vocab_size=require_whole(config, "vocab_size"),
        max_position_embeddings=require_whole(config, "max_position_embeddings"),
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=stored_dtype(config),
        **(facts | family.facts(config)),
    )
