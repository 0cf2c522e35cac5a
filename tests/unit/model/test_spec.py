"""One set of checkpoint keys under every attention back end: TransformerEngine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.architecture.tensors import megatron_tensors
from megatron_cpt.model.build import build_model
from megatron_cpt.model.spec import RMSNorm
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config


@pytest.mark.parametrize("attention", ["sdpa", "block_causal", "unfused"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_tied", "llama3_rope"])
def test_checkpoint_keys_are_those_of_the_mapping(tmp_path: Path, attention: str, name: str) -> None:
    arch = read_architecture(save_tiny_model(name, tmp_path))
    model = build_model(make_config(model={"attention": attention}), arch)[0]
    keys = {tensor.key for key, tensor in model.sharded_state_dict().items() if not key.endswith("_extra_state")}
    stacked = {m.megatron if m.layer is None else f"decoder.layers.{m.name_in_layer}" for m in megatron_tensors(arch)}
    assert keys == stacked


def test_norm_marks_its_weight_for_sequence_parallelism(tmp_path: Path) -> None:
    arch = read_architecture(save_tiny_model("base", tmp_path))
    model = build_model(make_config(), arch)[0]
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * arch.num_layers + 1
    assert all(norm.weight.sequence_parallel is False for norm in norms)
    model.config.sequence_parallel = True
    marked = RMSNorm(model.config, 8, eps=1e-6)
    assert marked.weight.sequence_parallel is True
    x = torch.randn(3, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(marked(x), expected, atol=1e-6)
