"""`tokenizer.json`: Hugging Face `tokenizers` is the reference, `fastokens` the fast equal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.tokenizers import tokenizer as interface
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer, EncodeBatch, Ids, Lengths
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)


def load(
    file: Path,
    eod_token: str | None,
    split_special: bool,
    post_processor: bool,
    backend: str,
    sample: Sequence[str],
) -> CorpusTokenizer:
    """Read `file`, resolve the EOD, and choose the encoder by the self-check on `sample`."""
    raw = interface.read_json(file)
    added = raw.get("added_tokens", [])
    vocabulary = _vocabulary(raw, file)
    special = [str(token["content"]) for token in added if token.get("special")]
    eod, eod_id = interface.resolve_eod(vocabulary, eod_token, stated_eos(file.parent), file)
    reference, decode = _reference(file, split_special, post_processor)
    name, encode = "tokenizers", reference
    if backend == "auto":
        texts = [*sample, *special, " ".join(special)]
        name, encode = _fastest(file, split_special, post_processor, reference, texts)
    return CorpusTokenizer(
        name=file.parent.name if file.name == "tokenizer.json" else file.stem,
        kind="huggingface",
        backend=name,
        fingerprint=interface.fingerprint_of_json(raw),
        vocab_size=max(vocabulary.values()) + 1,
        eod_id=eod_id,
        eod_token=eod,
        special_ids=frozenset(vocabulary[token] for token in special),
        encode_batch=encode,
        decode=decode,
    )


def _vocabulary(raw: dict[str, Any], file: Path) -> dict[str, int]:
    """Token -> id of the model and the added tokens (an added token may lie above the model's vocabulary)."""
    vocab = raw.get("model", {}).get("vocab")
    if isinstance(vocab, list):  # unigram: [[piece, score], ...] in id order
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    if not isinstance(vocab, dict) or not vocab:
        raise DataError(f"{file} has no vocabulary under model.vocab", hint="give a whole tokenizer.json")
    return vocab | {str(token["content"]): int(token["id"]) for token in raw.get("added_tokens", [])}


def stated_eos(folder: Path) -> str | None:
    """`eos_token` of tokenizer_config.json beside the tokenizer, if it states one."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    eos = interface.read_json(config).get("eos_token")
    if isinstance(eos, dict):
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None


def _reference(file: Path, split_special: bool, post_processor: bool) -> tuple[EncodeBatch, Any]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer: {error}", hint="copy the tokenizer again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = split_special

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        rows = [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=post_processor)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return encode_batch, decode


def _fastest(
    file: Path, split_special: bool, post_processor: bool, reference: EncodeBatch, sample: Sequence[str]
) -> tuple[str, EncodeBatch]:
    """fastokens when it loads the file and agrees with the reference on the sample, else the reference."""
    try:
        fast = _fastokens(file, split_special, post_processor)
        if interface.encodings_equal(reference, fast, sample):
            return "fastokens", fast
        reason = f"its ids differ from the reference on the self-check sample of {len(sample)} texts"
    except Exception as error:  # a native library: whatever it raises, the reference still works
        reason = f"it cannot load or run this tokenizer ({error})"
    log.warning("fastokens is not used: %s. Encoding with Hugging Face tokenizers, about 50x slower.", reason)
    return "tokenizers", reference


def _fastokens(file: Path, split_special: bool, post_processor: bool) -> EncodeBatch:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        ids, offsets = tokenizer.encode_batch_flat(
            texts, add_special_tokens=post_processor, split_special_tokens=split_special
        )
        ends: Lengths = np.frombuffer(offsets, np.int64)
        return np.frombuffer(ids, np.int32), ends[1:] - ends[:-1]

    return encode_batch
