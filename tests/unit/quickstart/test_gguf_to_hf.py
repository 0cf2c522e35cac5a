"""A tiny Llama written as GGUF the way llama.cpp writes it, and read back: same logits, same token ids."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf_to_hf
import numpy as np
import pytest
import torch

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 32, 3
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "ab"]


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_theta=1e4,
        initializer_range=0.3, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # values that bfloat16 holds exactly
    return model


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the two halves of a head become pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _write_gguf(model: torch.nn.Module, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    for name, value in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template("{{ messages }}")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for theirs, ours in gguf_to_hf.TOP_NAMES.items():
        if theirs != "output.weight":
            writer.add_tensor(theirs, state[ours])
    for layer in range(LAYERS):
        for theirs, ours in gguf_to_hf.LAYER_NAMES.items():
            array = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", _permuted(array, heads) if heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(original: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def _logits(model_dir: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, len(TOKENS))[None]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def test_logits_equal_the_model_that_was_written(original: torch.nn.Module, gguf_file: Path, tmp_path: Path) -> None:
    gguf_to_hf.convert(gguf_file, tmp_path / "model")
    with torch.no_grad():
        wanted = original(torch.arange(3, len(TOKENS))[None]).logits
    torch.testing.assert_close(_logits(tmp_path / "model"), wanted, atol=1e-6, rtol=0)
    assert not list(tmp_path.glob("*.partial"))


def test_negative_control_rows_left_permuted_change_the_logits(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_to_hf.convert(gguf_file, tmp_path / "right")
    monkeypatch.setattr(gguf_to_hf, "_undo_rotary_permutation", lambda rows, heads: rows)
    gguf_to_hf.convert(gguf_file, tmp_path / "wrong")
    assert (_logits(tmp_path / "wrong") - _logits(tmp_path / "right")).abs().max() > 1e-2


def test_tiny_is_a_whole_small_model_of_fixed_random_weights(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("one", "two"):
        gguf_to_hf.convert(gguf_file, tmp_path / name, tiny=True)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values())  # no tensor missing, surplus or misshapen
    assert model.config.num_hidden_layers == gguf_to_hf.TINY["llama.block_count"]
    bytes_one, bytes_two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert bytes_one == bytes_two


def test_tokenizer_is_the_files_and_does_not_hide_that_it_is_a_chat_model(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gguf_to_hf.convert(gguf_file, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("cab", add_special_tokens=False)["input_ids"] == [TOKENS.index("c"), TOKENS.index("ab")]
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [2]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == "{{ messages }}"
