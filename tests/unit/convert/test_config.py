"""The model's config from what Megatron stored: Megatron-Bridge's run_config.yaml, Megatron-LM's args."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import DefaultSavePlanner

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.megatron_args import megatron_args
from checkpoint_convert.megatron_config import check_facts, refuse_other_models
from checkpoint_convert.megatron_fields import changes_the_model, is_known
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.stored_model import StoredModel
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import architecture_from_config, read_architecture
from megatron_cpt.errors import ConversionError
from tests.unit.convert.test_foreign import global_tensors, stacked, write_legacy
from tests.unit.convert.tiny_checkpoints import assert_same_weights, write_hf

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
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


def test_args_among_the_shards_are_read_as_those_of_common_pt(tmp_path: Path) -> None:
    """Megatron-Core 0.19 writes no common.pt."""
    hf = write_hf(tmp_path / "base", "llama")
    args = megatron_args(read_architecture(hf), {"x": "bfloat16"}, 2, 1, None, 7)
    for name, rotary_percent in (("right", 1.0), ("wrong", 0.5)):
        args.rotary_percent = rotary_percent
        shards = {**dict(stacked(global_tensors(hf))), "common_state/shard_0_1": [{"args": args, "iteration": 7}]}
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(shards, checkpoint_id=tmp_path / name, planner=planner, no_dist=True)
    opened = open_checkpoint(tmp_path / "right")
    assert opened.arch == read_architecture(hf)
    convert(opened, tmp_path / "out", Options(to="hf"))
    assert_same_weights(hf, tmp_path / "out")
    for hf_config in (None, hf):
        with pytest.raises(ConversionError, match=r"not supported: rotary_percent = 0\.5"):
            open_checkpoint(tmp_path / "wrong", hf_config=hf_config)


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


# Values of Megatron's switches that give another model, by the names of both Megatron-LM and Megatron-Bridge.
OTHER_MODELS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "apply_layernorm_1p": "auto",
    "layernorm_zero_centered_gamma": 2,
    "apply_residual_connection_post_layernorm": True,
    "add_bias_linear": True,
    "swiglu": False,
    "gated_linear_unit": False,
    "activation_func": "torch.nn.functional.gelu",
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "squared_relu": True,
    "quick_geglu": True,
    "position_embedding_type": "none",
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 4,
    "rope_type": "yarn",
    "no_rope_freq": [0, 1, 0, 1],
    "mrope_section": [8, 4, 4],
    "softmax_type": "learnable",
    "softmax_scale": 1.0,
    "qk_l2_norm": True,
    "window_size": (127, 0),
    "window_attn_skip_freq": 2,
    "attention_output_gate": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "gated_delta_net",
    "num_experts": 8,
    "mtp_num_layers": 1,
    "is_hybrid_model": True,
    "hybrid_override_pattern": "M*M*",
    "heterogeneous_layers_config_path": "layers.json",
    "spec": ["my.module", "my_spec"],
    "rotary_base": [10000, 1000000],
}
LLAMA_CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}
LLAMA_CONFIG |= {"num_attention_heads": 4, "vocab_size": 77, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}


def check(stored: list[StoredModel], arch: Architecture) -> None:
    refuse_other_models(stored, arch)
    check_facts(stored, arch, Path("config.json"))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_switch_that_changes_the_mathematics_is_refused_by_name(name: str) -> None:
    arch = architecture_from_config(LLAMA_CONFIG)
    with pytest.raises(ConversionError, match=name) as caught:
        check([StoredModel(Path("common.pt"), {name: OTHER_MODELS[name]})], arch)
    assert caught.value.exit_code == 2 and caught.value.hint


def test_values_that_change_nothing_pass() -> None:
    arch = architecture_from_config(LLAMA_CONFIG)
    fields = {"softmax_scale": 8**-0.5, "window_size": (-1, 0), "activation_func": "torch.nn.functional.silu"}
    fields |= {"kv_lora_rank": 32, "moe_router_topk": 2, "rotary_percent": 1, "fp8": "hybrid", "glu_linear_offset": 0.0}
    check([StoredModel(Path("common.pt"), fields)], arch)
    mistral = architecture_from_config(
        LLAMA_CONFIG | {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2}
    )
    stored = [StoredModel(Path("common.pt"), {"window_size": (15, 0)})]
    check(stored, mistral)
    with pytest.raises(ConversionError, match="window_size"):
        check(stored, arch)


def test_every_field_of_megatron_core_is_on_the_list() -> None:
    """A new version's fields show here; its defaults are either ours or a model that is refused."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    fields = [field for kind in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(kind)]
    assert len(fields) > 250
    assert [field.name for field in fields if not is_known(field.name)] == []
    arch = architecture_from_config(LLAMA_CONFIG)
    gpt_defaults = {"normalization", "add_bias_linear", "gated_linear_unit", "activation_func"}
    gpt_defaults |= {"multi_latent_attention", "rope_type"}  # of MLATransformerConfig
    wrong = {field.name for field in fields if changes_the_model(field.name, field.default, arch)}
    assert wrong <= gpt_defaults


@pytest.mark.parametrize(
    "entrance", ["args", "args and --hf-config", "args and hf/", "run_config.yaml and hf/", "legacy"]
)
def test_the_list_guards_every_entrance(tmp_path: Path, entrance: str) -> None:
    """The same switch is refused wherever config.json comes from, and the control passes."""
    hf = write_hf(tmp_path / "base", "llama")
    args = megatron_args(read_architecture(hf), {"x": "bfloat16"}, 1, 1, None, 7)
    folder = tmp_path / "ckpt"
    hf_config = hf if entrance in ("args and --hf-config", "legacy") else None

    def write(rotary_percent: float) -> None:
        args.rotary_percent = rotary_percent
        if entrance == "legacy":
            shutil.rmtree(folder, ignore_errors=True)
            write_legacy(hf, folder, {"args": args})
        elif entrance.startswith("args"):
            torch.save({"args": args, "iteration": 7}, folder / "common.pt")
        else:
            model = bridge_model(hf) | {"rotary_percent": rotary_percent}
            (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))

    if entrance != "legacy":
        dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=folder, no_dist=True)
    if entrance.endswith("hf/"):
        shutil.copytree(hf, folder / "hf")
    write(1.0)
    open_checkpoint(folder, hf_config=hf_config)
    write(0.5)
    with pytest.raises(ConversionError, match=r"not supported: rotary_percent = 0\.5"):
        open_checkpoint(folder, hf_config=hf_config)


@pytest.mark.parametrize(
    ("stored", "scaling"),
    [
        ({"use_rope_scaling": True, "rope_scaling_factor": 8.0}, None),
        ({"use_rope_scaling": False}, LLAMA3),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, LLAMA3),
        ({"rope_scaling": True, "rope_scaling_factor": 8.0}, LLAMA3 | {"low_freq_factor": 2.0}),
        ({"scale_factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 4096}, LLAMA3),
    ],
)
def test_a_contradicting_rope_scaling_is_found(stored: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    arch = architecture_from_config(LLAMA_CONFIG | {"rope_scaling": scaling})
    with pytest.raises(MismatchError, match="rope_scaling"):
        check([StoredModel(Path("common.pt"), stored)], arch)
    same = {"scale_factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
    arch = architecture_from_config(LLAMA_CONFIG | {"rope_scaling": LLAMA3})
    check([StoredModel(Path("common.pt"), same)], arch)


def test_a_scaling_with_other_constants_survives_its_way_through_args(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "base", "llama", rope_scaling=LLAMA3 | {"original_max_position_embeddings": 4096})
    convert(open_checkpoint(hf), tmp_path / "ckpt", Options(to="torch_dist"))
    shutil.rmtree(tmp_path / "ckpt" / "hf")
    assert open_checkpoint(tmp_path / "ckpt").arch == read_architecture(hf)


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3, "beta_fast": 8.0, "truncate": False}])
def test_yarn_survives_its_way_through_args(tmp_path: Path, more: dict[str, Any]) -> None:
    hf = write_hf(tmp_path / "base", "qwen2", rope_scaling=YARN | more)
    convert(open_checkpoint(hf), tmp_path / "ckpt", Options(to="torch_dist"))
    shutil.rmtree(tmp_path / "ckpt" / "hf")
    assert open_checkpoint(tmp_path / "ckpt").arch == read_architecture(hf)


def test_yarn_on_one_side_only_is_refused() -> None:
    plain, stretched = (architecture_from_config(LLAMA_CONFIG | more) for more in ({}, {"rope_scaling": YARN}))
    fields = vars(megatron_args(stretched, {"x": "bfloat16"}, 1, 1, None, 7))
    check([StoredModel(Path("common.pt"), fields)], stretched)
    with pytest.raises(ConversionError, match="position_embedding_type = 'yarn'"):
        check([StoredModel(Path("common.pt"), fields)], plain)
    with pytest.raises(ConversionError, match="position_embedding_type = 'rope'"):
        check([StoredModel(Path("common.pt"), {"position_embedding_type": "rope"})], stretched)
    with pytest.raises(MismatchError, match="rope_scaling"):
        check([StoredModel(Path("common.pt"), fields | {"yarn_beta_fast": 16.0})], stretched)


def test_a_field_that_is_not_on_the_list_is_named_in_the_receipt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = write_hf(tmp_path / "base", "llama")
    args = megatron_args(read_architecture(hf), {"x": "bfloat16"}, 1, 1, None, 7)
    args.a_switch_of_tomorrow, args.lr = 3, 0.1
    write_legacy(hf, tmp_path / "ckpt", {"args": args})
    receipt = convert(open_checkpoint(tmp_path / "ckpt"), tmp_path / "out", Options(to="hf"))
    assert receipt["source"]["unknown_megatron_fields"] == ["a_switch_of_tomorrow = 3"]
    assert "a_switch_of_tomorrow = 3" in caplog.text


def hf_tokenizer_checkpoint(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """As Megatron-LM saves with a Hugging Face tokenizer: args.vocab_size is None. Returns base and iteration."""
    hf = write_hf(tmp_path / "base", "llama")
    args = megatron_args(read_architecture(hf), {"x": "bfloat16"}, 1, 1, None, 7)
    args.vocab_size, args.padded_vocab_size = None, 256
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", "nowhere/tokenizer"
    vars(args).update(changes)
    folder = tmp_path / "series" / "iter_0000007"
    dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=folder, no_dist=True)
    torch.save({"args": args, "iteration": 7}, folder / "common.pt")
    (tmp_path / "series" / "latest_checkpointed_iteration.txt").write_text("7")
    return hf, folder


def write_tokenizer(folder: Path, rows: int) -> Path:
    folder.mkdir(exist_ok=True)
    vocabulary = {f"t{i}": i for i in range(rows - 1)}
    content = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": rows - 1, "content": "<eos>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_hugging_face_tokenizer_gives_the_vocabulary(tmp_path: Path) -> None:
    """From the folder that --hf-config names, beside the tracker, or as the args say; else it is asked for."""
    hf, folder = hf_tokenizer_checkpoint(tmp_path)
    rows = read_architecture(hf).vocab_size
    with pytest.raises(ConversionError, match=r"vocab_size: HuggingFaceTokenizer \(nowhere/tokenizer\)") as caught:
        open_checkpoint(folder)
    assert "--hf-config" in str(caught.value.hint)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", rows)
    assert open_checkpoint(folder, hf_config=tokenizer).arch == read_architecture(hf)
    receipt = convert(open_checkpoint(folder, hf_config=tokenizer), tmp_path / "out", Options(to="hf"))
    assert "tokenizer.json" in receipt["side_files"]
    assert_same_weights(hf, tmp_path / "out")
    write_tokenizer(folder.parent, rows)
    assert open_checkpoint(folder.parent).arch == read_architecture(hf)
    (folder.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match="is not a tokenizer"):
        open_checkpoint(folder.parent)


def test_the_tokenizer_that_the_args_name_is_used_where_it_is(tmp_path: Path) -> None:
    named = write_tokenizer(tmp_path / "named", 77)
    hf, folder = hf_tokenizer_checkpoint(tmp_path, tokenizer_model=str(named))
    opened = open_checkpoint(folder)
    assert opened.arch == read_architecture(hf) and opened.side_dir == named


def test_a_config_beside_the_tracker_is_found_and_checked(tmp_path: Path) -> None:
    """Where Pai-Megatron puts the base model's files."""
    hf, folder = hf_tokenizer_checkpoint(tmp_path)
    config = json.loads((hf / "config.json").read_text())
    (folder.parent / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder.parent, 77)
    receipt = convert(open_checkpoint(folder.parent), tmp_path / "out", Options(to="hf"))
    assert receipt["side_files"] == ["config.json", "tokenizer.json", "README.md"]
    (folder.parent / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(MismatchError, match="rms_norm_eps"):
        open_checkpoint(folder.parent)


def test_a_null_tokenizer_has_one_row_more_than_it_was_asked_for(tmp_path: Path) -> None:
    """`--vocab-size 76` means 77 rows, of which the last is the end of a document."""
    hf, folder = hf_tokenizer_checkpoint(tmp_path, tokenizer_type="NullTokenizer", vocab_size=76)
    convert(open_checkpoint(folder), tmp_path / "out", Options(to="hf"))
    assert_same_weights(hf, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (77, 76)


@pytest.mark.parametrize(("eod", "seen"), [(None, 76), (3, 3)])
def test_a_null_tokenizer_of_megatron_core_0_18_has_its_eod_among_its_rows(
    tmp_path: Path, eod: int | None, seen: int
) -> None:
    _, folder = hf_tokenizer_checkpoint(
        tmp_path, tokenizer_type="NullTokenizer", vocab_size=77, null_tokenizer_eod_id=eod
    )
    convert(open_checkpoint(folder), tmp_path / "out", Options(to="hf"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (77, seen)


def test_reading_the_args_runs_no_code_of_the_file(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    hf, folder = hf_tokenizer_checkpoint(tmp_path)
    state = torch.load(folder / "common.pt", weights_only=False)
    state["args"].evil = Evil()
    torch.save(state, folder / "common.pt")
    open_checkpoint(folder, hf_config=hf)
    assert not (tmp_path / "made").exists()
