"""The model families: one file each. A new dense family = one file, one line here, one tiny-model test."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import llama, mistral, qwen2, qwen3
from megatron_cpt.architecture.families.family import Config, Family, build_architecture, named_dtype
from megatron_cpt.architecture.rope import RopeChange, with_rope
from megatron_cpt.errors import ConversionError

FAMILIES: dict[str, Family] = {
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
}

__all__ = ["FAMILIES", "Family", "architecture_from_config", "family_of", "read_architecture", "read_config"]


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def architecture_from_config(config: Config) -> Architecture:
    """Facts of the model that a parsed config.json describes; ConversionError for anything not supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"config.json says model_type {model_type!r}; supported families are {', '.join(FAMILIES)}",
            hint="a dense decoder of the Llama lineage is one short file in megatron_cpt/architecture/families/",
        )
    return build_architecture(FAMILIES[model_type], config)


def read_config(model_dir: Path) -> Config:
    """config.json of a Hugging Face directory."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ConversionError(f"no config.json in {model_dir}", hint="give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(
            f"{path} is not valid JSON: {error}", hint="copy the model's config.json again"
        ) from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} is not a JSON object", hint="copy the model's config.json again")
    return config


def read_architecture(model_dir: Path, rope: RopeChange | None = None) -> Architecture:
    """Facts of the model in a Hugging Face directory; the dtype is read from the weights if need be.

    `rope`: other rotary positions than its config.json says.
    """
    config = read_config(model_dir)
    if named_dtype(config) is None:
        dtype = _dtype_of_weights(model_dir)
        config = config | ({"dtype": dtype} if dtype else {})
    try:
        return architecture_from_config(with_rope(config, rope))
    except ConversionError as error:  # its sentences begin with config.json: say which
        named = error.message.replace("config.json", str(model_dir / "config.json"), 1)
        raise ConversionError(named, hint=error.hint) from error


def _dtype_of_weights(model_dir: Path) -> str | None:
    """dtype of the first tensor of the first safetensors file, None when there is none to read."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = dict(json.loads(file.read(min(length, 10**8))))
        except (struct.error, ValueError):
            return None  # a damaged file; its reader says so
        return next((names.get(t["dtype"], t["dtype"]) for n, t in header.items() if n != "__metadata__"), None)
    return None
