"""Rotary positions in a config.json: what it says of them, and the same file with other ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_cpt.architecture.facts import Llama3RopeScaling, RopeScaling, YarnRopeScaling
from megatron_cpt.errors import ConfigError, ConversionError

DEFAULT_ROPE_THETA = 10000.0  # of transformers, for every family
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's own
ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_theta")


@dataclass(frozen=True)
class RopeChange:
    """Other rotary positions for a model that is trained on; None leaves a thing as it is.

    `theta` is a new base, which stretches all wavelengths (ABF, arXiv:2309.16039). `yarn_factor` stretches the long
    ones by that factor (YaRN, arXiv:2309.00071), beyond `original_max_position_embeddings` tokens, by default the
    model's positions. `max_position_embeddings` are the positions afterwards; with YaRN they follow.
    """

    theta: float | None = None
    yarn_factor: float | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None


def rope_facts(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, with the precedence of transformers 5.

    `rope_scaling`, where it says anything, replaces `rope_parameters` as a whole; a base inside either wins over
    `rope_theta` beside it.

    Raises:
        ConversionError: the file asks for what Megatron-Core does not compute, or makes no sense.
    """
    scaling = _stated(config)
    theta = scaling["rope_theta"] if "rope_theta" in scaling else config.get("rope_theta", DEFAULT_ROPE_THETA)
    if theta is None or isinstance(theta, bool) or not float(theta) > 0:
        raise ConversionError(f"config.json says rope_theta = {theta}: not above 0", hint="fetch it again")
    for place in (scaling, config):
        if place.get("partial_rotary_factor") not in (None, 1):
            factor = place["partial_rotary_factor"]
            raise ConversionError(f"config.json asks for partial_rotary_factor = {factor}: not supported")
    kind = _kind(config)
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        numbers = ("factor", "low_freq_factor", "high_freq_factor")
        return float(theta), Llama3RopeScaling(
            **{key: float(_require(scaling, key)) for key in numbers},
            original_max_position_embeddings=int(_require(scaling, "original_max_position_embeddings")),
        )
    if kind == "yarn":
        return float(theta), _yarn_facts(scaling)
    raise ConversionError(
        f"config.json asks for rope scaling {kind!r}: only 'default', 'llama3' and 'yarn' are supported",
        hint="if the model was trained without it, remove the entry from config.json",
    )


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ConversionError(f"config.json says rope_scaling {scaling!r}: not an object", hint="fetch it again")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ConversionError("config.json gives different rope_parameters per layer type: not supported")
    return scaling


def _kind(config: dict[str, Any]) -> Any:
    scaling = _stated(config)
    return scaling["rope_type"] if "rope_type" in scaling else scaling.get("type", "default")


def _require(scaling: dict[str, Any], key: str) -> Any:
    if scaling.get(key) is None:
        raise ConversionError(f"config.json has no {key!r} in its rope scaling", hint="fetch it again")
    return scaling[key]


def _yarn_facts(scaling: dict[str, Any]) -> YarnRopeScaling:
    factor = float(_require(scaling, "factor"))
    if not factor >= 1:
        raise ConversionError(f"config.json says a YaRN factor of {factor}: below 1", hint="fetch it again")
    found = YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=int(_require(scaling, "original_max_position_embeddings")),
        beta_fast=float(scaling.get("beta_fast") or BETA_FAST),
        beta_slow=float(scaling.get("beta_slow") or BETA_SLOW),
        attention_factor=_attention_factor(scaling, factor),
        truncate=bool(scaling.get("truncate", True)),
    )
    if factor == 1 and found.attention_factor != 1:
        raise ConversionError(
            f"config.json asks for a YaRN attention_factor of {found.attention_factor} with a factor of 1: "
            "Megatron-Core does not compute that",
            hint="remove attention_factor where the model was trained without it",
        )
    return found


def _attention_factor(scaling: dict[str, Any], factor: float) -> float:
    """What cosines and sines are multiplied by, as transformers works it out."""
    stated, one, all_dims = (scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)
    if one and all_dims:
        return _mscale(factor, float(one)) / _mscale(factor, float(all_dims))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def with_rope(config: dict[str, Any], change: RopeChange | None) -> dict[str, Any]:
    """The content of config.json with `change` made; made twice it is made once.

    Keys are written as transformers 4 and 5 read them alike: `rope_theta` and, with a scaling, `rope_scaling`.

    Raises:
        ConfigError: the model has a scaling that YaRN would replace, or would lose positions.
        ConversionError: `config` itself is not understood.
    """
    if change is None:
        return config
    theta, scaling = rope_facts(config)
    stated = {key: value for key, value in _stated(config).items() if key not in ("type", "rope_theta")}
    stated["rope_type"] = _kind(config)
    before, positions = config.get("max_position_embeddings"), change.max_position_embeddings
    if change.yarn_factor is not None:
        original = _stretched_by_yarn(before, scaling, change)
        positions = round(change.yarn_factor * original)
        stated = {"rope_type": "yarn", "factor": change.yarn_factor, "original_max_position_embeddings": original}
    if positions is not None and before is not None and positions < before:
        raise ConfigError(
            f"model.rope would leave the model {positions:,} positions of its {before:,}",
            hint=f"a larger yarn_factor, or max_position_embeddings: {before} or more",
        )
    changed = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    changed["rope_theta"] = theta if change.theta is None else change.theta
    if stated["rope_type"] != "default":
        changed["rope_scaling"] = stated
    return changed if positions is None else changed | {"max_position_embeddings": positions}


def _stretched_by_yarn(positions: int | None, scaling: RopeScaling | None, change: RopeChange) -> int:
    """The tokens beyond which YaRN stretches: those asked for, of the model's own YaRN, or its positions."""
    if isinstance(scaling, Llama3RopeScaling):
        raise ConfigError(
            "model.rope.yarn_factor: the model has a llama3 rope scaling already, and a model has one scaling",
            hint="model.rope.theta stretches its base; with it set model.rope.max_position_embeddings",
        )
    if isinstance(scaling, YarnRopeScaling):
        positions = scaling.original_max_position_embeddings
    original = change.original_max_position_embeddings or positions
    if original is None:
        raise ConfigError(
            "model.rope.yarn_factor: config.json does not say the model's positions",
            hint="set model.rope.original_max_position_embeddings",
        )
    return original
