"""peft's folder of low-rank adapters: adapter_config.json and adapter_model.safetensors, as its clients load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from checkpoint_convert.checkpoint import IndexedCheckpoint
from checkpoint_convert.hf import add_safetensors
from checkpoint_convert.target import Target
from megatron_cpt.config.sections.lora import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def plan_peft(folder: Path, source: IndexedCheckpoint, dtypes: dict[str, str]) -> Target:
    """Where each factor goes, and the config beside them."""
    assert source.lora is not None
    target = Target(folder)
    shapes = {name: tensor.shape for name, tensor in source.weights.tensors.items()}
    add_safetensors(target, folder / ADAPTER_WEIGHTS, shapes, dtypes)
    config = adapter_config(source.lora, base_of(source))
    target.small_files[folder / ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return target


def base_of(source: IndexedCheckpoint) -> str:
    """Return the `model.init_from` of the run that trained the adapters; empty when there is no run."""
    if source.run_config is None:
        return ""
    run = yaml.safe_load(source.run_config.read_text(encoding="utf-8"))
    return str(run.get("model", {}).get("init_from", ""))


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
