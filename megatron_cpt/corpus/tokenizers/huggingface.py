"""`tokenizer.json`: Hugging Face `tokenizers` is the reference, `fastokens` the fast equal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from megatron_cpt.corpus.tokenizers import tokenizer as interface
from megatron_cpt.corpus.tokenizers.stated_class import check_stated_class
from megatron_cpt.corpus.tokenizers.stated_tokens import (
    StatedTokens,
    read_stated_tokens,
    with_named_tokens,
    with_numbered_tokens,
)
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
    raw, stated = _read(file)
    if file.name == "tokenizer.json":
        check_stated_class(file.parent, raw, stated)
    eod, eod_id = interface.resolve_eod(_vocabulary(raw, file), _special(raw), eod_token, stated.eos, file)
    encoded = _special_by_role(_encoded(raw, stated, split_special), eod)
    vocabulary, special = _vocabulary(encoded, file), _special(encoded)
    text = orjson.dumps(encoded).decode()
    reference = _Reference(text, file, split_special, post_processor)
    name, encode = "tokenizers", cast(EncodeBatch, reference.encode_batch)
    if backend == "auto":
        spelled = sorted(special, key=vocabulary.__getitem__)
        texts = [*sample, *spelled, " ".join(spelled)]
        name, encode = _fastest(text, split_special, post_processor, reference.encode_batch, texts)
    return CorpusTokenizer(
        name=file.parent.name if file.name == "tokenizer.json" else file.stem,
        kind="huggingface",
        backend=name,
        fingerprint=interface.fingerprint_of_json(raw),
        vocab_size=max(vocabulary.values()) + 1,
        eod_id=eod_id,
        eod_token=eod,
        special_ids=frozenset({eod_id, *(vocabulary[token] for token in special)}),
        encode_batch=encode,
        decode=reference.decode,
        prefix_ids=reference.prefix_ids,
        suffix_ids=reference.suffix_ids,
        unknown_id=_unknown_id(raw, vocabulary, eod_id),
    )


def fingerprint(file: Path) -> str:
    """Fingerprint of a tokenizer.json with the tokens that the files beside it number."""
    return interface.fingerprint_of_json(_read(file)[0])


def _read(file: Path) -> tuple[dict[str, Any], StatedTokens]:
    raw, stated = interface.read_json(file), read_stated_tokens(file.parent)
    _vocabulary(raw, file)
    _join_merges(raw["model"])
    return with_numbered_tokens(raw, stated), stated


def _join_merges(model: dict[str, Any]) -> None:
    """Spell merges "a b", as older files do: fastokens reads them in four fifths of the time of ["a", "b"]."""
    merges = model.get("merges") or []
    if all(type(merge) is list and len(merge) == 2 for merge in merges):
        joined = list(map(" ".join, merges))
        if sum(merge.count(" ") for merge in joined) == len(joined):  # no piece holds a space of its own
            model["merges"] = joined


def _encoded(raw: dict[str, Any], stated: StatedTokens, split_special: bool) -> dict[str, Any]:
    """What encodes: with the named tokens, unless they are special and never come out of a text that is split."""
    whole = with_named_tokens(raw, stated)
    known = {token["content"] for token in raw.get("added_tokens", [])}
    new = [token for token in whole.get("added_tokens", []) if token["content"] not in known]
    return raw if split_special and all(token["special"] for token in new) else whole


def _vocabulary(raw: dict[str, Any], file: Path) -> dict[str, int]:
    """Token -> id of the model and the added tokens (an added token may lie above the model's vocabulary)."""
    vocab = raw.get("model", {}).get("vocab")
    if isinstance(vocab, list):  # unigram: [[piece, score], ...] in id order
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    if not isinstance(vocab, dict) or not vocab:
        raise DataError(f"{file} has no vocabulary under model.vocab", hint="give a whole tokenizer.json")
    return vocab | {str(token["content"]): int(token["id"]) for token in raw.get("added_tokens", [])}


def _unknown_id(raw: dict[str, Any], vocabulary: dict[str, int], eod_id: int) -> int | None:
    """The id of the model's unknown token, unless it is the EOD, which a document holds for another reason."""
    model = raw["model"]
    stated = model["unk_id"] if isinstance(model.get("unk_id"), int) else vocabulary.get(str(model.get("unk_token")))
    return None if stated == eod_id else stated


def _special(raw: dict[str, Any]) -> set[str]:
    return {str(token["content"]) for token in raw.get("added_tokens", []) if token.get("special")}


def _special_by_role(raw: dict[str, Any], eod: str) -> dict[str, Any]:
    """Flag the EOD special: an added token that is not is found in text even where special tokens are split."""
    tokens = raw.get("added_tokens", [])
    return raw | {"added_tokens": [token | {"special": True} if token["content"] == eod else token for token in tokens]}


@contextmanager
def _panics_told(file: Path) -> Iterator[None]:
    """A panic of a library in Rust as a DataError: Python sees it as no Exception, and would print a traceback."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the tokenizers library breaks down with {file}: {error}",
            hint="its added tokens contradict each other; save it with transformers' AutoTokenizer and try again",
        ) from error


class _Reference:
    """The `tokenizers` library, by which every other encoder is judged."""

    def __init__(self, text: str, file: Path, split_special: bool, post_processor: bool) -> None:
        from tokenizers import Tokenizer

        self._file = file
        try:
            with _panics_told(file):
                self._tokenizer = Tokenizer.from_str(text)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a tokenizer: {error}", hint="copy the tokenizer again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = split_special
        self._post_processor = post_processor
        self.prefix_ids, self.suffix_ids = self._added_ids() if post_processor else ((), ())
        if post_processor and not self.prefix_ids and not self.suffix_ids:
            log.warning("post_processor is on, but the tokenizer %s adds nothing to a text", file)

    def _added_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare, whole = (self._tokenizer.encode("a b", add_special_tokens=added).ids for added in (False, True))
        return interface.added_by_post_processor(bare, whole)

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        with _panics_told(self._file):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=self._post_processor)
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _fastest(
    text: str, split_special: bool, post_processor: bool, reference: EncodeBatch, sample: Sequence[str]
) -> tuple[str, EncodeBatch]:
    """fastokens when it loads the tokenizer and agrees with the reference on the sample, else the reference."""
    try:
        fast = _fastokens(text, split_special, post_processor)
        with _panics_told(Path("tokenizer.json")):
            equal = interface.encodings_equal(reference, fast, sample)
        if equal:
            return "fastokens", fast
        reason = f"its ids differ from the reference on the self-check sample of {len(sample)} texts"
    except Exception as error:  # a native library: whatever it raises, the reference still works
        reason = f"it cannot load or run this tokenizer ({error})"
    log.warning("fastokens is not used: %s. Encoding with Hugging Face tokenizers, about 50x slower.", reason)
    return "tokenizers", reference


def _fastokens(text: str, split_special: bool, post_processor: bool) -> EncodeBatch:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(text)
    tokenizer.no_truncation()

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        ids, offsets = tokenizer.encode_batch_flat(
            texts, add_special_tokens=post_processor, split_special_tokens=split_special
        )
        ends: Lengths = np.frombuffer(offsets, np.int64)
        return np.frombuffer(ids, np.int32), ends[1:] - ends[:-1]

    return encode_batch
