"""A tiny byte-level BPE tokenizer in Qwen2's style, and small corpora, made at run time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_cpt.corpus.schema import Corpus, parse_corpus

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The patient presented with acute fever and a dry cough; the doctor ordered a chest radiograph.",
    "Continued pre-training adapts a language model to a new domain without starting from nothing.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "第一条 为了保护当事人的合法权益，制定本法。",
    "Ünïcödé: café, naïve, Straße, 😀 and e\u0301.",
]


def build_tokenizer(folder: Path, vocab_size: int = 400, eos: str = "<|endoftext|>") -> Path:
    """A byte-level BPE trained on TEXTS, with Qwen2's special tokens, saved as a model folder would have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


def write_jsonl(path: Path, texts: Sequence[Any], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Corpus]:
    """A corpus over `files` with its dataset at tmp_path/out/set."""

    def make(*files: Path, source: dict[str, Any] | None = None, **keys: Any) -> Corpus:
        raw = {
            "output_prefix": str(tmp_path / "out" / "set"),
            "tokenizer": str(tokenizer_dir),
            "sources": [{"files": [str(file) for file in files], **(source or {})}],
            **keys,
        }
        return parse_corpus(raw, "test")

    return make
