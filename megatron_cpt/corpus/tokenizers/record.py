"""What a manifest says of the tokenizer that wrote its dataset."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerRecord:
    """`fingerprint` is a sha256 of the tokenizer's content, not of its path."""

    name: str
    kind: str  # "huggingface", "sentencepiece" or "tiktoken"
    fingerprint: str
    vocab_size: int  # largest id + 1, added tokens included
    eod_id: int
    eod_token: str
