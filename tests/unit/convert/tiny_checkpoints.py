"""Tiny checkpoints made without transformers and without Megatron, for fast tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.architecture.families import FAMILIES, architecture_from_config
from megatron_cpt.architecture.tensors import hf_tensor_shapes
from megatron_cpt.runs.marker import MARKER, Marker

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "intermediate_size": 48,
    "vocab_size": 77,  # divides by no tensor parallel size
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}


def config(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, "architectures": [FAMILIES[family].hf_class], **SIZES, **changes}


def write_hf(
    folder: Path, family: str = "qwen2", *, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, **changes: Any
) -> Path:
    """A Hugging Face folder of random weights with a tokenizer file that is only copied."""
    folder.mkdir(parents=True)
    settings = config(family, **{"torch_dtype": str(dtype).removeprefix("torch."), **changes})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    generator = torch.Generator().manual_seed(7)
    shapes = hf_tensor_shapes(architecture_from_config(settings))
    tensors = {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = hf_tensors(a), hf_tensors(b)
    assert left.keys() == right.keys() and len(left) > 0
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file folder; `__` in a name stands for a dot."""
    tensors = hf_tensors(folder)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def mark_complete(series: Path, iteration: int) -> None:
    """What the trainer writes last into a checkpoint's folder."""
    marker = Marker(iteration, 64 * iteration, {}, {}, "replicated", 1, "2026-01-01T00:00:00", {})
    (series / f"iter_{iteration:07d}" / MARKER).write_text(json.dumps(marker.to_json()))
