"""The model's config from what Megatron stored: Megatron-Bridge's run_config.yaml, Megatron-LM's args."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.megatron_args import megatron_args
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.errors import ConversionError
from tests.unit.convert.test_foreign import global_tensors, stacked, write_legacy
from tests.unit.convert.tiny_checkpoints import assert_same_weights, write_hf

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"rms_norm_eps": 1e-5},
    "llama": {"rope_theta": 500000.0, "num_key_value_heads": 4, "rope_scaling": LLAMA3},
}


def bridge_model(hf: Path) -> dict[str, Any]:
    """The `model` section as Megatron-Bridge writes it, with some of the many fields that do not matter here."""
    arch = read_architecture(hf)
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "seq_length": arch.max_position_embeddings,
        "layernorm_epsilon": arch.rms_norm_eps,
        "rotary_base": int(arch.rope_theta),
        "rotary_percent": 1.0,
        "rope_scaling": arch.rope_scaling is not None,
        "rope_scaling_factor": 1.0 if arch.rope_scaling is None else arch.rope_scaling.factor,
        "share_embeddings_and_output_weights": arch.tie_word_embeddings,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "num_moe_experts": None,
        "window_size": None,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "bf16": True,
        "tensor_model_parallel_size": 2,
    }


def bridge_checkpoint(tmp_path: Path, family: str, *, nested: bool = False, **changes: Any) -> tuple[Path, Path]:
    hf = write_hf(tmp_path / "base", family, **MODELS[family])
    folder = tmp_path / "ckpt" / "iter_0000020"
    dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=folder, no_dist=True)
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("20")
    torch.save({"content_metadata": {}}, folder / "common.pt")
    model = bridge_model(hf) | changes
    if nested:
        outer = {key: model.pop(key) for key in ("vocab_size", "seq_length", "share_embeddings_and_output_weights")}
        model = {"_target_": "megatron.bridge.models.gpt.BridgeGPTModelConfig", **outer, "transformer": model}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"checkpoint": {"save": "x"}, "model": model}))
    return hf, folder


def facts(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "sliding_window"}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("nested", [False, True])
def test_megatron_bridge_needs_no_hf_config(tmp_path: Path, family: str, nested: bool) -> None:
    hf, folder = bridge_checkpoint(tmp_path, family, nested=nested)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(tmp_path / "ckpt")
    assert opened.iteration == 20
    assert opened.arch == read_architecture(hf)
    convert(opened, tmp_path / "out", Options(to="hf"))
    assert_same_weights(hf, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert facts(json.loads((tmp_path / "out" / "config.json").read_text())) == facts(
        json.loads((hf / "config.json").read_text())
    ) | {"hidden_act": "silu", "tie_word_embeddings": opened.arch.tie_word_embeddings}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_moe_experts": 8}, "num_moe_experts = 8"),
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'"),
        ({"window_size": [128, 0]}, "window_size"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "activation_func"),
        ({"vocab_size": None}, "does not say vocab_size"),
        ({"num_layers": None}, "does not say num_layers"),
        ({"vocab_size": 99}, "embed|config.json asks for"),
    ],
)
def test_what_does_not_suffice_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    bridge_checkpoint(tmp_path, "qwen2", **changes)
    with pytest.raises(ConversionError, match=words):
        open_checkpoint(tmp_path / "ckpt")


def test_a_config_of_another_model_is_found(tmp_path: Path) -> None:
    """Neither a name nor a shape shows another rope base."""
    hf, _ = bridge_checkpoint(tmp_path, "qwen2")
    assert open_checkpoint(tmp_path / "ckpt", hf_config=hf).arch.rope_theta == 10000.0
    config = json.loads((hf / "config.json").read_text()) | {"rope_theta": 1e6}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"contradicts .*run_config.yaml\n  rope_theta: 10000.0 there, 1000000.0"):
        open_checkpoint(tmp_path / "ckpt", hf_config=hf)


def test_an_unreadable_run_config(tmp_path: Path) -> None:
    _, folder = bridge_checkpoint(tmp_path, "qwen2")
    for text in ("model: [", "model: 3", "train: {}", "!!python/object/apply:os.system ['true']"):
        (folder / "run_config.yaml").write_text(text)
        with pytest.raises(ConversionError, match="no readable `model` section"):
            open_checkpoint(tmp_path / "ckpt")


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
@pytest.mark.parametrize("family", MODELS)
def test_megatron_lm_args_need_no_hf_config(tmp_path: Path, kind: str, family: str) -> None:
    hf = write_hf(tmp_path / "base", family, **MODELS[family])
    arch = read_architecture(hf)
    args = megatron_args(arch, {"x": "bfloat16"}, 2, 1, None, 7)
    if kind == "legacy":
        write_legacy(hf, tmp_path / "ckpt", {"args": args})
    else:
        dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=tmp_path / "ckpt", no_dist=True)
        torch.save({"args": args, "iteration": 7}, tmp_path / "ckpt" / "common.pt")
    opened = open_checkpoint(tmp_path / "ckpt")
    assert opened.arch == arch
    convert(opened, tmp_path / "out", Options(to="hf"))
    assert_same_weights(hf, tmp_path / "out")
    args.norm_epsilon = 1e-3
    common = tmp_path / "ckpt" / "common.pt"
    if kind == "torch_dist":
        torch.save({"args": args, "iteration": 7}, common)
        with pytest.raises(MismatchError, match=r"rms_norm_eps: 0\.001 there"):
            open_checkpoint(tmp_path / "ckpt", hf_config=hf)


def test_our_own_checkpoint_without_its_hf_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_hf(tmp_path / "base", "qwen3")
    convert(open_checkpoint(base), tmp_path / "ckpt", Options(to="torch_dist", tp=2))
    shutil.rmtree(tmp_path / "ckpt" / "hf")
    opened = open_checkpoint(tmp_path / "ckpt")
    assert opened.arch == read_architecture(base) and "config.json is made from" in caplog.text


def test_nothing_says_which_model_it_is(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "base")
    dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=tmp_path / "ckpt", no_dist=True)
    with pytest.raises(ConversionError, match="does not say which model it is") as caught:
        open_checkpoint(tmp_path / "ckpt")
    assert "--hf-config" in str(caught.value.hint)
    torch.save({"args": argparse.Namespace(num_layers=4)}, tmp_path / "ckpt" / "common.pt")
    with pytest.raises(ConversionError, match="does not say hidden_size"):
        open_checkpoint(tmp_path / "ckpt")
