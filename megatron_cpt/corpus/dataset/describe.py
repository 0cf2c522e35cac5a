"""What a dataset holds: its manifest, the lengths of its documents, and the first of them as ids and text."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_cpt.corpus.dataset.indexed import IndexedReader
from megatron_cpt.corpus.dataset.soundness import foreign_id, not_sound, open_dataset
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer
from megatron_cpt.errors import DataError

PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


def describe_dataset(prefix: str, documents: int = 0, tokenizer_path: str | None = None) -> dict[str, Any]:
    """Manifest, length statistics, and the first documents (ids at both ends; text with a tokenizer).

    Raises:
        DataError: the dataset is damaged, or `tokenizer_path` is not the tokenizer that wrote it.
    """
    manifest, reader = open_dataset(prefix)
    lengths = np.add.reduceat(
        np.asarray(reader.sequence_lengths, np.int64),
        reader.document_indices[:-1][np.diff(reader.document_indices) > 0],
    )
    tokenizer = None
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path, eod_token=manifest.tokenizer.eod_token, backend="reference")
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise DataError(
                f"{tokenizer_path} is not the tokenizer that wrote {prefix} ({manifest.tokenizer.name})",
                hint="give the tokenizer of the dataset",
            )
    shown = [reader.document(index) for index in range(min(documents, reader.document_count))]
    if any(foreign_id(ids, manifest.tokenizer.vocab_size) is not None for ids in shown):
        raise not_sound(prefix, ["ids of its first documents are outside the vocabulary"])
    return {
        "prefix": prefix,
        "manifest": manifest,
        "document_tokens": {name: int(np.percentile(lengths, p)) for name, p in PERCENTILES.items() if len(lengths)},
        "documents": [_describe_document(reader, i, tokenizer) for i in range(min(documents, reader.document_count))],
    }


def _describe_document(reader: IndexedReader, index: int, tokenizer: CorpusTokenizer | None) -> dict[str, Any]:
    ids = reader.document(index)
    entry: dict[str, Any] = {
        "document": index,
        "tokens": len(ids),
        "sequences": int(reader.document_indices[index + 1] - reader.document_indices[index]),
        "first_ids": ids[:8].tolist(),
        "last_ids": ids[-4:].tolist(),
    }
    if tokenizer is not None:
        entry["text_start"] = tokenizer.decode(ids[:64].tolist())
        entry["text_end"] = tokenizer.decode(ids[-16:].tolist())
    return entry
