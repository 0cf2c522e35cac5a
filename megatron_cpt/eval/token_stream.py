"""What a model is measured on: a tokenised dataset, or text that the model's own tokenizer encodes now."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path
from megatron_cpt.corpus.dataset.soundness import foreign_id, open_dataset
from megatron_cpt.corpus.documents import UnitTally
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.corpus.tokenizers.load import load_tokenizer, tokenizer_fingerprint
from megatron_cpt.errors import DataError
from megatron_cpt.eval.perplexity import TokenStream

logger = logging.getLogger(__name__)

_DECODED_AT_ONCE = 1 << 20  # tokens; a character cut at such a place counts as U+FFFD


def open_token_stream(data: str, tokenizer_dir: Path, vocab_size: int, json_key: str = "text") -> TokenStream:
    """The tokens of `data`: the PREFIX of a dataset, or a file or folder of text as preprocessing reads it.

    `vocab_size` is the number of rows of the model's embedding. In text, each document is followed by the
    tokenizer's end-of-document token, as preprocessing does.

    Raises:
        DataError: `data` is not there, half-written or damaged, or holds ids of another tokenizer than the model's.
    """
    if manifest_path(data).exists() or (bin_path(data).exists() and idx_path(data).exists()):
        stream = _dataset_stream(data, tokenizer_dir)
    elif Path(data).exists():
        stream = _text_stream(Path(data), tokenizer_dir, json_key)
    else:
        raise DataError(f"{data}: neither a dataset nor a text", hint="give a PREFIX, a .jsonl, .parquet or .txt file")
    if (wrong := foreign_id(stream.tokens, vocab_size)) is not None:
        raise DataError(
            f"{data} holds token id {wrong}, the model's vocabulary has {vocab_size:,} rows",
            hint="preprocess the data with the tokenizer of this model",
        )
    return stream


def text_bytes(stream: TokenStream, ranges: Iterable[tuple[int, int]], tokenizer_dir: Path) -> int | None:
    """Return the UTF-8 bytes of the text that the tokens in `ranges` [start, end) stand for, without separators.

    None where the model has no tokenizer that could say.
    """
    try:
        tokenizer = load_tokenizer(tokenizer_dir)
    except DataError as error:
        logger.warning("bits per byte are not known: %s", error.message)
        return None
    total = 0
    for start, end in ranges:
        for at in range(start, end, _DECODED_AT_ONCE):
            ids = np.asarray(stream.tokens[at : min(end, at + _DECODED_AT_ONCE)])
            total += len(tokenizer.decode(ids[ids != stream.eod_id].tolist()).encode("utf-8", "replace"))
    return total


def _dataset_stream(prefix: str, tokenizer_dir: Path) -> TokenStream:
    manifest, reader = open_dataset(prefix)
    recorded = manifest.tokenizer
    ours = recorded.fingerprint
    if (tokenizer_dir / "tokenizer.json").is_file():
        ours = tokenizer_fingerprint(tokenizer_dir)
    else:
        logger.warning("%s has no tokenizer.json: only the ids of %s are checked", tokenizer_dir, prefix)
    if recorded.fingerprint != ours:
        raise DataError(
            f"{prefix} was written with the tokenizer {recorded.name} ({recorded.fingerprint[:12]}), "
            f"the model in {tokenizer_dir} has another one ({ours[:12]})",
            hint="preprocess the data with the tokenizer of this model",
        )
    sequence_ends = np.cumsum(reader.sequence_lengths, dtype=np.int64)
    last_sequences = reader.document_indices[1:] - 1
    ends = sequence_ends[last_sequences[np.diff(reader.document_indices) > 0]]
    return TokenStream(prefix, reader.tokens, ends, recorded.eod_id)


def _text_stream(path: Path, tokenizer_dir: Path, json_key: str) -> TokenStream:
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = [text for text in _documents(path, json_key) if text]
    if not texts:
        raise DataError(f"{path} holds no text", hint="give a file with at least one document")
    ids, lengths = tokenizer.encode_batch(texts)
    ends = np.cumsum(lengths)
    tokens = np.insert(ids, ends, tokenizer.eod_id)
    return TokenStream(str(path), tokens, ends + np.arange(1, len(ends) + 1), tokenizer.eod_id)


def _documents(path: Path, json_key: str) -> Iterator[str]:
    """The documents that preprocessing would read; here one that cannot be read is an error, not a count."""
    source = Source(files=(str(path),), text=json_key)
    corpus = Corpus(output_prefix=path.stem, tokenizer="", sources=(source,))
    tally = UnitTally()
    for unit in plan_units(corpus):
        for batch in read_unit(unit, tally, corpus.max_document_bytes):
            yield from batch.texts
    if tally.rejects:
        first = tally.rejects[0]
        raise DataError(
            f"{first.path}, record {first.place}: {first.reason}, {first.detail} "
            f"({len(tally.rejects)} such of {tally.documents_read} documents)",
            hint="fix the file, or state another --json-key",
        )
