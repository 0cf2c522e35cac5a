"""Find a tokenizer on the disk and load it with the library that its file asks for.

`path` is a Hugging Face model folder, a `tokenizer.json`, a SentencePiece `.model` or a tiktoken ranks file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_cpt.corpus.tokenizers import huggingface, sentencepiece, tiktoken
from megatron_cpt.corpus.tokenizers.self_check import SELF_CHECK_SAMPLE
from megatron_cpt.corpus.tokenizers.tokenizer import (
    CorpusTokenizer,
    SpecialTokensInText,
)
from megatron_cpt.errors import DataError


def load_tokenizer(
    path: str | Path,
    *,
    eod_token: str | None = None,
    special_tokens_in_text: SpecialTokensInText = "literal",
    post_processor: bool = False,
    backend: Literal["auto", "reference"] = "auto",
    sample: Sequence[str] = (),
) -> CorpusTokenizer:
    """Load the tokenizer at `path`; `sample` is text of the corpus that joins the built-in self-check sample.

    `special_tokens_in_text` says what a special token spelled out in the text becomes: ordinary text
    ("literal"), the special token ("parse", as Megatron-LM does), or ids by which the caller rejects the
    document ("reject", encoded as "parse"). `post_processor` adds what the tokenizer itself adds around a text: for
    Hugging Face its post-processor's tokens, for SentencePiece the beginning of sequence. Raises DataError for a path
    or an EOD that is not there.
    """
    file = find_tokenizer_file(path)
    literal, texts = special_tokens_in_text == "literal", (*SELF_CHECK_SAMPLE, *sample)
    if file.suffix == ".json":
        return huggingface.load(file, eod_token, literal, post_processor, backend, texts)
    if _is_tiktoken(file):
        if post_processor:
            raise DataError(f"{file}: tiktoken ranks have no post-processor", hint="leave post_processor off")
        return tiktoken.load(file, eod_token, literal, backend, texts)
    return sentencepiece.load(file, eod_token, literal, post_processor)


def find_tokenizer_file(path: str | Path) -> Path:
    """The tokenizer file that `path` (a file or a model folder) means."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist", hint="give a model folder or its tokenizer.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (file := path / name).is_file():
            return file
    raise DataError(
        f"{path} has no tokenizer.json and no tokenizer.model",
        hint="save the tokenizer with transformers' AutoTokenizer(...).save_pretrained first",
    )


def tokenizer_fingerprint(path: str | Path) -> str:
    """sha256 of what decides the ids; equal for two copies of one tokenizer wherever they lie."""
    file = find_tokenizer_file(path)
    if file.suffix == ".json":
        return huggingface.fingerprint(file)
    if _is_tiktoken(file):
        return tiktoken.fingerprint(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_tiktoken(file: Path) -> bool:
    return file.suffix in (".tiktoken", ".bpe")
