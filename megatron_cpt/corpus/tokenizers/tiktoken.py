"""tiktoken ranks: lines of `base64 rank`. The file has neither the split pattern nor special tokens.

Both come from NAME.json beside the file, {"pattern": ..., "special_tokens": {token: id}, "normalize": "NFC" or
null}, or are known for the names below. The reference is the `tiktoken` library.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_cpt.corpus.tokenizers import tokenizer as interface
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer, EncodeBatch, Ids, Lengths
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)

_COPY = "copy it again"
_IDS_END = 1 << 31  # ids are int32
_FORMS = (None, "NFC", "NFD", "NFKC", "NFKD")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
KNOWN: dict[str, dict[str, Any]] = {
    "qwen": {
        "pattern": _CONTRACTIONS + _WORDS % r"\p{N}",
        "special_tokens": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
        "normalize": "NFC",
    },
    "cl100k_base": {
        "pattern": _CONTRACTIONS + _WORDS % r"\p{N}{1,3}",
        "special_tokens": {
            "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        "normalize": None,
    },
}  # fmt: skip


def load(
    file: Path, eod_token: str | None, split_special: bool, backend: str, sample: Sequence[str]
) -> CorpusTokenizer:
    """Read a ranks file and choose the encoder by the self-check on `sample`."""
    settings = _settings(file)
    special: dict[str, int] = settings["special_tokens"]
    ranks = _ranks(file, special)
    vocabulary = {token.decode("utf-8", "replace"): rank for token, rank in ranks.items()} | special
    eod, eod_id = interface.resolve_eod(vocabulary, special, eod_token, None, file)
    normalize = settings.get("normalize")
    reference, decode = _reference(file, ranks, settings, split_special)
    name, encode = "tiktoken", reference
    if backend == "auto":
        texts = [_normalized(text, normalize) for text in [*sample, *special]]
        name, encode = _fastest(file, settings, split_special, reference, texts)
    content = file.read_bytes() + orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)
    return CorpusTokenizer(
        name=file.stem,
        kind="tiktoken",
        backend=name,
        fingerprint=hashlib.sha256(content).hexdigest(),
        vocab_size=max(*ranks.values(), *special.values()) + 1,
        eod_id=eod_id,
        eod_token=eod,
        special_ids=frozenset({eod_id, *special.values()}),
        encode_batch=lambda texts: encode([_normalized(text, normalize) for text in texts]),
        decode=decode,
    )


def fingerprint(file: Path) -> str:
    content = file.read_bytes() + orjson.dumps(_settings(file), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()


def _normalized(text: str, form: Any) -> str:
    return text if form is None or text.isascii() else unicodedata.normalize(form, text)


def _settings(file: Path) -> dict[str, Any]:
    beside = file.with_suffix(".json")
    if beside.is_file():
        settings = {"normalize": None} | interface.read_json(beside)
        if not isinstance(settings.get("pattern"), str) or not isinstance(settings.get("special_tokens"), dict):
            raise DataError(f"{beside} needs pattern and special_tokens", hint="see docs/corpus.md")
        if settings["normalize"] not in _FORMS:
            raise DataError(
                f"{beside}: normalize {settings['normalize']!r}", hint='give "NFC", "NFD", "NFKC", "NFKD" or null'
            )
        ids = list(settings["special_tokens"].values())
        if any(type(index) is not int or not 0 <= index < _IDS_END for index in ids) or len(set(ids)) < len(ids):
            raise DataError(
                f"{beside}: special_tokens needs an id of its own for each token", hint="see docs/corpus.md"
            )
        return settings
    if file.stem in KNOWN:
        return KNOWN[file.stem]
    raise DataError(
        f"{file}: a ranks file has no split pattern and no special tokens",
        hint=f"write them to {beside.name} beside it, or name the file as one of {', '.join(KNOWN)}",
    )


def _ranks(file: Path, special: Mapping[str, int]) -> dict[bytes, int]:
    """Read the lines of a whole ranks file: every id is a token's, a special one's included, and only one's."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token, index = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:
            raise DataError(f"{file}:{number} is no line of tiktoken ranks: {error}", hint=_COPY) from error
        if token in ranks:
            raise DataError(f"{file}:{number} repeats the token {token!r}", hint=_COPY)
        ranks[token] = index
    if reason := _damage(ranks, special):
        raise DataError(f"{file} is not a whole tiktoken ranks file: {reason}", hint=_COPY)
    return ranks


def _damage(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> str | None:
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        return f"the byte {missing[0]:#04x} is no token"
    used = set(ranks.values())
    if len(used) < len(ranks):
        return "two tokens have one rank"
    if outside := [rank for rank in used if not 0 <= rank < _IDS_END]:
        return f"the rank {outside[0]} is no id"
    filled = sorted(used | set(special.values()))
    if gaps := [place for place, index in enumerate(filled) if index != place and place < max(used)]:
        return f"the rank {gaps[0]} is missing"
    if taken := [token for token, index in special.items() if index in used]:
        return f"the special token {taken[0]!r} has the rank {special[taken[0]]} of another token"
    return None


def _reference(
    file: Path, ranks: dict[bytes, int], settings: dict[str, Any], split_special: bool
) -> tuple[EncodeBatch, Any]:
    import tiktoken

    try:
        encoding = tiktoken.Encoding(
            file.stem, pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens=settings["special_tokens"]
        )
    except ValueError as error:
        raise DataError(
            f"{file}: the split pattern is no expression: {error}", hint=f"correct it in {file.stem}.json"
        ) from error

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        if split_special:
            rows = encoding.encode_ordinary_batch(list(texts), num_threads=1)
        else:
            rows = encoding.encode_batch(list(texts), num_threads=1, allowed_special="all")
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    return encode_batch, lambda ids: encoding.decode(list(ids))


def _fastest(
    file: Path, settings: dict[str, Any], split_special: bool, reference: EncodeBatch, sample: Sequence[str]
) -> tuple[str, EncodeBatch]:
    """fastokens when it loads the file and agrees with tiktoken on the sample, else tiktoken."""
    try:
        import fastokens

        special = settings["special_tokens"]
        tokenizer = fastokens.Tokenizer.from_tiktoken(str(file), pattern=settings["pattern"], special_tokens=special)

        def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
            ids, offsets = tokenizer.encode_batch_flat(texts, split_special_tokens=split_special)
            ends: Lengths = np.frombuffer(offsets, np.int64)
            return np.frombuffer(ids, np.int32), ends[1:] - ends[:-1]

        if interface.encodings_equal(reference, encode_batch, sample):
            return "fastokens", encode_batch
        reason = f"its ids differ from the reference on the self-check sample of {len(sample)} texts"
    except Exception as error:  # a native library: whatever it raises, the reference still works
        reason = f"it cannot load or run this tokenizer ({error})"
    log.warning("fastokens is not used: %s. Encoding with tiktoken, about 20x slower.", reason)
    return "tiktoken", reference
