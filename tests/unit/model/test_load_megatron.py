"""Weights from a torch_dist checkpoint: all of them, of this model, or one clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import random_weights
from megatron_cpt.model.load_megatron import is_megatron_checkpoint, load_megatron_weights
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config


def build(name: str, folder: Path, seed: int) -> torch.nn.Module:
    arch = read_architecture(save_tiny_model(name, folder))
    chunks = build_model(make_config(), arch)
    random_weights(chunks, arch, seed)
    return chunks[0]


def save(model: torch.nn.Module, folder: Path, **beside: Any) -> Path:
    folder.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict(), **beside}, str(folder))
    return folder


def tensor(key: str) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.ones(2))


def test_weights_come_back(tmp_path: Path) -> None:
    saved, other = build("base", tmp_path, 1), build("base", tmp_path, 2)
    checkpoint = save(saved, tmp_path / "checkpoint")
    assert is_megatron_checkpoint(checkpoint) and not is_megatron_checkpoint(tmp_path)
    load_megatron_weights([other], checkpoint)
    for a, b in zip(saved.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = save(build("base", tmp_path, 1), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="does not hold this model"):
        load_megatron_weights([build("deep", tmp_path, 2)], checkpoint)


def test_nan_is_refused(tmp_path: Path) -> None:
    model = build("base", tmp_path, 1)
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = float("nan")
    checkpoint = save(model, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight .* incomplete or not finite"):
        load_megatron_weights([build("base", tmp_path, 2)], checkpoint)


def test_what_is_saved_beside_the_weights_is_not_asked_for(tmp_path: Path) -> None:
    model = build("base_tied", tmp_path, 1)
    beside = {
        "optimizer": tensor("optimizer.state.exp_avg.embedding.word_embeddings.weight"),
        "rng": ShardedObject("rng_state", [1], (1,), (0,)),
        "extra": ShardedObject("decoder.layers.mlp.linear_fc1._extra_state_of_another_engine", None, (1,), (0,)),
        "output": tensor("output_layer.weight"),  # of a tied model: some tools store the copy
    }
    load_megatron_weights([build("base_tied", tmp_path, 2)], save(model, tmp_path / "checkpoint", **beside))


def test_a_tensor_that_the_model_would_drop_is_refused(tmp_path: Path) -> None:
    model = build("base", tmp_path, 1)
    key = "decoder.layers.self_attention.linear_proj.bias"
    checkpoint = save(model, tmp_path / "checkpoint", surplus=tensor(key))
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} belongs to nothing in the model"):
        load_megatron_weights([build("base", tmp_path, 2)], checkpoint)


def test_a_checkpoint_without_a_tensor_of_the_model_is_refused(tmp_path: Path) -> None:
    saved = build("base_tied", tmp_path, 1)  # no biases, no output layer, and norms of queries and keys
    with pytest.raises(CheckpointError, match=r"output_layer\.weight is missing.*k_layernorm") as refusal:
        load_megatron_weights([build("base", tmp_path, 2)], save(saved, tmp_path / "checkpoint"))
    assert "linear_qkv.bias is missing" in refusal.value.message
