"""Vocabulary extension: fewer tokens for the same text, rows that are means, everything else untouched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.vocabulary import (
    Extension,
    _to_bf16,
    extend_model,
    extend_rows,
    extend_tokenizer,
    propose_tokens,
)
from megatron_cpt.errors import DataError

DOMAIN = ["The hepatosplenomegaly and the cardiomyopathy were noted; cardiomyopathy again."] * 30


def test_proposed_tokens_save_the_most(tokenizer_dir: Path) -> None:
    tokens = propose_tokens(DOMAIN, tokenizer_dir, 2)
    assert sorted(tokens) == [" cardiomyopathy", " hepatosplenomegaly"]


def test_extended_tokenizer_and_model(tokenizer_dir: Path, tmp_path: Path) -> None:
    old = load_tokenizer(tokenizer_dir)
    tokens = propose_tokens(DOMAIN, tokenizer_dir, 2)
    extension = extend_tokenizer(tokenizer_dir, tokens, tmp_path / "new")
    new = load_tokenizer(tmp_path / "new")
    assert new.vocab_size == old.vocab_size + 2 and new.eod_id == old.eod_id
    assert new.fingerprint != old.fingerprint
    before, after = old.encode_batch(DOMAIN[:1])[0], new.encode_batch(DOMAIN[:1])[0]
    assert len(after) < len(before) and new.decode(after.tolist()) == DOMAIN[0]
    ids = [old.vocab_size, old.vocab_size + 1]
    assert set(ids) <= set(after.tolist())

    rng = np.random.default_rng(0)
    weights = {
        "model.embed_tokens.weight": rng.normal(size=(old.vocab_size, 8)).astype(np.float32),
        "model.norm.weight": rng.normal(size=8).astype(np.float32),
        "lm_head.weight": rng.normal(size=(old.vocab_size, 8)).astype(np.float16),
    }
    model = tmp_path / "model"
    model.mkdir()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps({"vocab_size": old.vocab_size, "hidden_size": 8}))
    assert extend_model(model, extension, tmp_path / "new") == new.vocab_size
    extended = load_file(tmp_path / "new" / "model.safetensors")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == new.vocab_size
    assert np.array_equal(extended["model.norm.weight"], weights["model.norm.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(extended[name][: old.vocab_size], weights[name])
        for token, pieces in zip(ids, extension.pieces, strict=True):
            mean = weights[name][list(pieces)].astype(np.float32).mean(axis=0)
            assert np.allclose(extended[name][token], mean, atol=1e-3)
            assert len(pieces) > 1
    assert load_tokenizer(tmp_path / "new").fingerprint == new.fingerprint


def test_padding_rows_are_used_before_the_matrix_grows() -> None:
    rows = np.arange(32, dtype=np.float32).reshape(8, 4)
    extension = Extension(("x",), ((0, 2),), 6)
    out = extend_rows(rows, extension)
    assert out.shape == (8, 4) and np.array_equal(out[6], (rows[0] + rows[2]) / 2)
    assert np.array_equal(out[[0, 1, 2, 3, 4, 5, 7]], rows[[0, 1, 2, 3, 4, 5, 7]])


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(_to_bf16(values), expected)


def test_known_token_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one token already"):
        extend_tokenizer(tokenizer_dir, ["<|endoftext|>"], tmp_path / "new")
