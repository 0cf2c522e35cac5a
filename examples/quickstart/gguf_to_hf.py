"""Turn a llama-architecture GGUF file into a Hugging Face directory, with gguf and numpy.

Inputs: the .gguf file. Outputs: `config.json`, `generation_config.json`, `model.safetensors` (bfloat16),
`tokenizer.json`, `tokenizer_config.json`. The 4-bit weights are dequantised, so this model is SmolLM2 as the
GGUF file holds it, slightly worse than the original; for a before/after comparison that is no matter.

llama.cpp stores the rows of q and k in the order of its own rotary kernel (pairs interleaved); Hugging Face
wants the two halves of a head one after the other, so those rows are put back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: <|endoftext|>, <|im_start|> and the like


# The tiny model: SmolLM2's tokenizer and vocabulary over a small body of random weights.
TINY = {
    "llama.block_count": 4,
    "llama.embedding_length": 128,
    "llama.feed_forward_length": 384,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
TINY_SEED = 0
TINY_INIT_STD = 0.02


def convert(source: Path, model_dir: Path, tiny: bool = False) -> None:
    """Write the Hugging Face directory `model_dir`, complete or not at all.

    `tiny` writes random weights in the shape `TINY` instead of the file's: a model that has learnt nothing, for
    seeing in a minute that everything works. (The real model cut to few layers is worse than random.)
    """
    reader = gguf.GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()} | (TINY if tiny else {})
    partial = model_dir.with_name(model_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = _random_weights(facts) if tiny else _weights(reader, facts)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config = _config(facts, tied="lm_head.weight" not in weights)
    _tokenizer(facts).save(str(partial / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": _tokenizer_config(facts),
        "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }.items():
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(model_dir, ignore_errors=True)
    partial.rename(model_dir)


def _weights(reader: gguf.GGUFReader, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = tensor.name
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.startswith("blk."):
            _, layer, kind, _ = name.split(".")
            if kind in heads:
                array = _undo_rotary_permutation(array, heads[kind])
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
        else:
            name = TOP_NAMES[name]
        weights[name] = torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16)
    return weights


def _random_weights(facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Normal(0, TINY_INIT_STD), ones for the norms, by a fixed seed; the output layer is tied to the embedding."""
    hidden, ffn = facts["llama.embedding_length"], facts["llama.feed_forward_length"]
    groups = facts["llama.attention.head_count"] // facts["llama.attention.head_count_kv"]
    shapes = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // groups, hidden),
        "attn_v": (hidden // groups, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    random = np.random.default_rng(TINY_SEED)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = np.ones(shape) if len(shape) == 1 else random.normal(0.0, TINY_INIT_STD, shape)
        return torch.from_numpy(values).to(torch.bfloat16)

    weights = {"model.embed_tokens.weight": draw((facts["llama.vocab_size"], hidden))}
    for layer in range(facts["llama.block_count"]):
        for kind, shape in shapes.items():
            weights[f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"] = draw(shape)
    return weights | {"model.norm.weight": draw((hidden,))}


def _undo_rotary_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
    """(heads * head_dim, hidden) with the rows of each head paired (0, half, 1, half+1, ...) -> halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.embedding_length"] // heads,
        "vocab_size": facts["llama.vocab_size"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file has it rounded to float32
        "rope_theta": facts["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits digits one by one, as `tokenizer.ggml.pre = smollm` means."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    )
    return tokenizer


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    """What the file says, chat template included: this is an Instruct checkpoint and must not hide it.

    Its end-of-sequence token ends a chat turn. The separator of documents in pre-training is another one,
    `<|endoftext|>`, which the preprocessing step names itself.
    """
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
