"""Text to token ids behind one small interface, by the fastest library that is id-for-id equal to the reference.

    load.load_tokenizer(path)  ->  CorpusTokenizer: encode_batch, decode, vocab_size, eod_id, eod_token, fingerprint

For `tokenizer.json` the reference is Hugging Face `tokenizers`; `fastokens` replaces it when both give the
same ids on a sample that is encoded at start, else the reference is used and a line says so.

End of document (EOD): stated by `eod_token`, else the first of these that is a special token here: `<|endoftext|>`,
`<|end_of_text|>`, the `eos_token` of tokenizer_config.json unless it ends a chat turn, `</s>`, `<eos>`.
A chat-turn token such as `<|im_end|>` is used only when it is stated. Whatever token it is, its role makes it special:
text that spells it does not become it, unless special tokens in the text are parsed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from megatron_cpt.corpus.tokenizers.record import TokenizerRecord
from megatron_cpt.errors import DataError

# One single-threaded process per core is the fastest arrangement (two threads in one process fall from 73 to
# 46 MB per CPU-second), and a library that has started no threads may be forked. Set before the imports below.
for _name in ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

log = logging.getLogger(__name__)

SpecialTokensInText = Literal["literal", "parse", "reject"]
Ids = np.ndarray[Any, np.dtype[np.int32]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]
EncodeBatch = Callable[[Sequence[str]], tuple[Ids, Lengths]]

PREFERRED_EOD = ("<|endoftext|>", "<|end_of_text|>")
FALLBACK_EOD = ("</s>", "<eos>")
CHAT_TURN_TOKENS = frozenset(
    {"<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<turn|>"}
)
# Megatron-Core's rule for the width of an id: 16 bits below this vocabulary size, else 32.
UINT16_VOCAB_LIMIT = 65_500


@dataclass(frozen=True)
class CorpusTokenizer:
    """A loaded tokenizer. `encode_batch(texts)` gives flat int32 ids and one int64 length per text, no EOD."""

    name: str
    kind: str
    backend: str  # the library that encodes: "fastokens", "tokenizers", "sentencepiece" or "tiktoken"
    fingerprint: str
    vocab_size: int
    eod_id: int
    eod_token: str
    special_ids: frozenset[int]  # the EOD is always one of them
    encode_batch: EncodeBatch
    decode: Callable[[Sequence[int]], str]
    prefix_ids: tuple[int, ...] = ()  # what encode_batch puts before every text (post_processor)
    suffix_ids: tuple[int, ...] = ()  # and after it
    unknown_id: int | None = None  # what text becomes that the vocabulary cannot say; None where it can say any

    @property
    def ends_with_eod(self) -> bool:
        """Whether encode_batch ends every text with the EOD itself."""
        return self.suffix_ids[-1:] == (self.eod_id,)

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size < UINT16_VOCAB_LIMIT else "int32"

    def record(self) -> TokenizerRecord:
        return TokenizerRecord(self.name, self.kind, self.fingerprint, self.vocab_size, self.eod_id, self.eod_token)


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{file} is not readable JSON: {error}", hint="copy the tokenizer again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} does not hold a JSON object", hint="copy the tokenizer again")
    return value


def fingerprint_of_json(raw: dict[str, Any]) -> str:
    """Fingerprint of a tokenizer.json: normaliser, pre-tokenizer, model and added tokens, in canonical order.

    Truncation, padding, post-processor and decoder do not change the ids of plain text and are left out, and
    so is the way merges are spelled ("a b" or ["a", "b"]), which depends on the library version that saved it.
    """
    model = {key: value for key, value in raw.get("model", {}).items() if value or value == 0}
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    content = {
        "model": model,
        "added_tokens": sorted(raw.get("added_tokens", []), key=lambda token: int(token["id"])),
        "normalizer": raw.get("normalizer"),
        "pre_tokenizer": raw.get("pre_tokenizer"),
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def resolve_eod(
    vocabulary: Mapping[str, int],
    special: Collection[str],
    eod_token: str | None,
    eos_token: str | None,
    where: Path,
) -> tuple[str, int]:
    """Find the end-of-document token and its id by the order in the module's docstring.

    Args:
        vocabulary: every token and its id.
        special: tokens that are special by the tokenizer's own word; a fallback is one of them.
        eod_token: what the user states.
        eos_token: what the tokenizer's configuration states.
        where: the tokenizer's file, for errors.

    Raises:
        DataError: a stated token is not in the vocabulary, or there is none to fall back to.
    """
    stated, by = (eod_token, "end-of-document token") if eod_token is not None else (eos_token, "the stated eos_token")
    if stated is not None and stated not in vocabulary:
        raise DataError(
            f"{by} {stated!r} is not in the vocabulary of {where}",
            hint=f"state another with --eod-token; tokens it has: {_eod_candidates(vocabulary)}",
        )
    if eod_token is not None:
        return eod_token, vocabulary[eod_token]
    own = (eos_token,) if eos_token and eos_token not in CHAT_TURN_TOKENS else ()
    for token in (*PREFERRED_EOD, *own, *FALLBACK_EOD):
        if token in special or token in own:
            return token, vocabulary[token]
    raise DataError(
        f"{where} has no known end-of-document token",
        hint=f"state it with --eod-token; tokens it has: {_eod_candidates(vocabulary)}",
    )


def added_by_post_processor(bare: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what stands before and after the ids of a text, given its ids without and with the post-processor."""
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise DataError(
        "the tokenizer's post-processor changes the ids of a text instead of adding to them",
        hint="leave post_processor off",
    )


def _eod_candidates(vocabulary: Mapping[str, int]) -> str:
    marked = [token for token in vocabulary if token.startswith(("<|", "</", "<e"))]
    return (
        ", ".join(repr(token) for token in sorted(marked, key=vocabulary.__getitem__)[:12]) or "none marked as special"
    )


def encodings_equal(reference: EncodeBatch, candidate: EncodeBatch, sample: Sequence[str]) -> bool:
    """True when both give the same ids for every text of the sample."""
    expected_ids, expected_lengths = reference(sample)
    ids, lengths = candidate(sample)
    return bool(np.array_equal(expected_lengths, lengths) and np.array_equal(expected_ids, ids))
