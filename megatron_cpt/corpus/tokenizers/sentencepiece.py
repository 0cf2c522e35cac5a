"""SentencePiece `.model` files, encoded by the library that defines them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.tokenizers import tokenizer as interface
from megatron_cpt.corpus.tokenizers.stated_tokens import StatedTokens, read_stated_tokens
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer, EncodeBatch, Ids, Lengths
from megatron_cpt.errors import DataError


def load(file: Path, eod_token: str | None, split_special: bool, bos: bool = False) -> CorpusTokenizer:
    """Read a .model. Its own end-of-sentence piece is the EOD unless another is stated."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{file} is not a SentencePiece model: {error}", hint="copy it again") from error
    count = int(processor.get_piece_size())
    vocabulary = {processor.id_to_piece(i): i for i in range(count)}
    special = {p: i for p, i in vocabulary.items() if processor.is_control(i)}
    own_eos = processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
    stated = read_stated_tokens(file.parent)
    _refuse_other_tokens(stated, vocabulary, processor, file)
    eod, eod_id = interface.resolve_eod(vocabulary, special, eod_token, stated.eos or own_eos, file)
    prefix_ids = (_bos_id(processor, file),) if bos else ()
    encode_batch = _plain(processor) if split_special else _parsing(processor, special)
    return CorpusTokenizer(
        name=file.stem,
        kind="sentencepiece",
        backend="sentencepiece",
        fingerprint=hashlib.sha256(file.read_bytes()).hexdigest(),
        vocab_size=count,
        eod_id=eod_id,
        eod_token=eod,
        special_ids=frozenset({eod_id, *special.values()}),
        encode_batch=_with_bos(encode_batch, *prefix_ids) if bos else encode_batch,
        decode=lambda ids: str(processor.decode(list(ids))),
        prefix_ids=prefix_ids,
        unknown_id=int(processor.unk_id()),
    )


def _refuse_other_tokens(stated: StatedTokens, vocabulary: dict[str, int], processor: Any, file: Path) -> None:
    """Refuse tokens of the model's folder that the .model does not know: AutoTokenizer would give other ids."""
    for index, token in stated.numbered:
        piece = vocabulary.get(token["content"])
        if piece == index and not (processor.is_byte(piece) or _is_plain(processor, piece)):
            continue
        raise DataError(
            f"{stated.where} states the token {token['content']!r} = {index}, which {file.name} "
            + ("does not have" if piece is None else f"has as the {'plain ' if piece == index else ''}piece {piece}"),
            hint="write a tokenizer.json with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
            "transformers, or give a copy of the .model alone",
        )


def _is_plain(processor: Any, piece: int) -> bool:
    """Whether a piece is one of text: neither control nor unknown nor defined by the user."""
    if processor.is_control(piece) or processor.is_unknown(piece):
        return False
    return bool(processor.get_score(piece) != 0.0)  # the score of a user-defined piece is 0


def _flat(rows: list[list[int]]) -> tuple[Ids, Lengths]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _bos_id(processor: Any, file: Path) -> int:
    if (bos_id := int(processor.bos_id())) < 0:
        raise DataError(f"{file} has no beginning-of-sequence token", hint="leave post_processor off")
    return bos_id


def _with_bos(encode_batch: EncodeBatch, bos_id: int) -> EncodeBatch:
    """Every text begins with `bos_id`, an empty one too."""

    def encode(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        ids, lengths = encode_batch(texts)
        return np.insert(ids, np.cumsum(lengths) - lengths, bos_id), lengths + 1

    return encode


def _plain(processor: Any) -> EncodeBatch:
    """SentencePiece never makes a control piece out of text."""
    return lambda texts: _flat(processor.encode(list(texts), num_threads=1))


def _parsing(processor: Any, special: dict[str, int]) -> EncodeBatch:
    """Control pieces spelled in the text become their ids, as Megatron-LM's tokenizer has it."""
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")

    def encode(text: str) -> list[int]:
        parts = pattern.split(text) if special else [text]
        pieces = [[special[part]] if part in special else processor.encode(part) for part in parts if part]
        return list(chain.from_iterable(pieces))

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return _flat([encode(text) for text in texts])

    return encode_batch
