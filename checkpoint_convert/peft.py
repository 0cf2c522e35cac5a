"""peft's folder of low-rank adapters: adapter_config.json and adapter_model.safetensors, as its clients load them."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from checkpoint_convert.checkpoint import (
    IndexedCheckpoint,
    LowRank,
    Merge,
    StoredTensor,
    check_dtype,
    check_names,
    check_shape,
)
from checkpoint_convert.hf import add_safetensors, read_safetensors
from checkpoint_convert.target import Target
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import linears
from megatron_cpt.architecture.rope import ROPE_KEYS, RopeChange
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.errors import ConversionError
from megatron_cpt.runs.adapters import PEFT_CONFIG

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


# What an adapter of this package is not made of, by the keys of adapter_config.json: any value but these is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:\w+\.)*(\w+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class PeftFolder:
    """Adapters as peft saves them."""

    path: Path
    lora: LoraConfig
    base: str  # base_model_name_or_path; empty when it is not said
    tensors: dict[str, StoredTensor]

    def check(self, arch: Architecture) -> None:
        """Raise MismatchError unless these are the adapters of whole layers of such a model: names and shapes."""
        wanted = adapter_shapes(self.lora, arch)
        check_names(wanted, self.tensors, self.path)
        for name, tensor in self.tensors.items():
            check_shape(name, tensor.shape, wanted[name], self.path)
            check_dtype(name, tensor.dtype, self.path)


def is_peft(path: Path) -> bool:
    return (path / PEFT_CONFIG).is_file()


def read_peft(path: Path) -> PeftFolder:
    """Index a folder that peft wrote; its targets are those that it has factors of.

    Raises:
        ConversionError: a file is missing or damaged, or the adapters are of a kind that is not known here.
    """
    try:
        config = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        odd = {key: config.get(key) for key, allowed in _NEUTRAL.items() if config.get(key) not in allowed}
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path / PEFT_CONFIG} is damaged: {error}", hint="copy the folder again") from error
    if odd:
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in odd.items())
        raise ConversionError(
            f"{path / PEFT_CONFIG} has {said}: such adapters are not known here",
            hint="only plain LoRA of one rank on the linears of all layers is; peft's merge_and_unload knows others",
        )
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ConversionError(f"{path} has no {ADAPTER_WEIGHTS}", hint="copy the whole folder; save it as safetensors")
    tensors = read_safetensors(path / ADAPTER_WEIGHTS)
    found = [_NAME.fullmatch(name) for name in tensors]
    if unknown := [name for name, match in zip(tensors, found, strict=True) if match is None]:
        raise ConversionError(
            f"{path / ADAPTER_WEIGHTS}: {unknown[0]} is no factor of a linear of a layer",
            hint="only adapters of the linears of the layers are known here",
        )
    targets = sorted({match.group(2) for match in found if match is not None})
    settings = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout") or 0.0,
        "rslora": bool(config.get("use_rslora")),
        "targets": targets,
    }
    try:
        lora = LoraConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConversionError(
            f"{path}: {first['loc'][0]} = {first['input']!r}: {first['msg']}", hint=f"look at its {PEFT_CONFIG}"
        ) from error
    if not lora.on:
        raise ConversionError(f"{path / PEFT_CONFIG} has no r", hint="copy the folder again")
    return PeftFolder(path, lora, str(config.get("base_model_name_or_path") or ""), tensors)


def merged(base: IndexedCheckpoint, path: Path, lora: LoraConfig, factors: dict[str, StoredTensor]) -> Merge:
    """Return what adds these factors, by peft's names, to the weights of `base`."""
    updates = {}
    for linear in (linears(base.arch)[name] for name in lora.targets):
        for layer in range(base.arch.num_layers):
            a, b = (factors[linear.adapter_name(layer, factor)] for factor in "AB")
            updates[f"model.layers.{layer}.{linear.module}.weight"] = LowRank(a, b, lora.scale)
    return Merge(path, lora, updates)


def adapter_shapes(lora: LoraConfig, arch: Architecture) -> dict[str, tuple[int, int]]:
    """Return the shape of every factor of such adapters by peft's names."""
    assert lora.rank is not None
    shapes = {}
    for linear in (linears(arch)[name] for name in lora.targets):
        for layer in range(arch.num_layers):
            shapes[linear.adapter_name(layer, "A")] = lora.rank, linear.in_features
            shapes[linear.adapter_name(layer, "B")] = linear.out_features, lora.rank
    return shapes


def plan_peft(folder: Path, source: IndexedCheckpoint, dtypes: dict[str, str]) -> Target:
    """Where each factor goes, and the config beside them."""
    assert source.lora is not None
    target = Target(folder)
    shapes = {name: tensor.shape for name, tensor in source.weights.tensors.items()}
    add_safetensors(target, folder / ADAPTER_WEIGHTS, shapes, dtypes)
    config = adapter_config(source.lora, base_of(source))
    if rope_of(source) is not None:
        said = {key: source.config[key] for key in (*ROPE_KEYS, "max_position_embeddings") if key in source.config}
        log.warning(
            "the adapters were trained with other rotary positions than the base has, which peft's format does not "
            "say: give the base's config.json %s, or take merge-lora",
            json.dumps(said),
        )
    target.small_files[folder / PEFT_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return target


def base_of(source: IndexedCheckpoint) -> str:
    """Return the `model.init_from` of the run that trained the adapters; empty when there is no run."""
    return str(_model_of_run(source).get("init_from", ""))


def rope_of(source: IndexedCheckpoint) -> RopeChange | None:
    """Return the rotary positions that the run which trained the adapters gave its base, None where it kept them."""
    rope = _model_of_run(source).get("rope")
    return None if rope is None else RopeChange(**rope)


def _model_of_run(source: IndexedCheckpoint) -> dict[str, Any]:
    if source.run_config is None:
        return {}
    return dict(yaml.safe_load(source.run_config.read_text(encoding="utf-8")).get("model", {}))


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """Return adapter_config.json: the fields that decide what the adapters compute; peft knows the others."""
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
