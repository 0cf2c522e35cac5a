"""Tiny models as config.json alone, and dry runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import architecture_from_config
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from tests.synthetic_model import CONFIG

# The vocabulary is padded as soon as it is divided.
_FACTS: dict[str, Any] = CONFIG | {"vocab_size": 250, "torch_dtype": "bfloat16"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "attention_bias": False}


def tiny_facts(**facts: Any) -> dict[str, Any]:
    """Return the content of a config.json."""
    return _FACTS | facts


def tiny(parallel: dict[str, Any], facts: dict[str, Any] | None = None, **sections: Any) -> RunConfigAndModel:
    """Return a config with this layout of ranks, its model and what follows."""
    parallel = {"gpus_per_node": parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)} | parallel
    tree = {
        "job_name": "tiny",
        "model": {"init_from": "random", **sections.pop("model", {})},
        "batch": {"seq_length": 64, "global_batch_size": 16, **sections.pop("batch", {})},
        "budget": {"train_tokens": 4096, "warmup_tokens": 0},
        "precision": {"dtype": "bf16", **sections.pop("precision", {})},
        "data": {"train": [{"name": "data", "prefix": "data"}]},
        "parallel": parallel,
        **sections,
    }
    config, arch = build_config(tree), architecture_from_config(tiny_facts(**(facts or {})))
    return config, arch, derive(config, arch)


RunConfigAndModel = tuple[RunConfig, Architecture, Derived]


def write_config_json(folder: Path, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_facts(**facts)))
    return folder
