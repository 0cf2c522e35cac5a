"""Tiny datasets written straight to disk, for tests of whatever reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_cpt.corpus.dataset.indexed import write_index
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord, bin_path, idx_path, write_manifest
from megatron_cpt.corpus.tokenizers.record import TokenizerRecord

EOD = 0


def random_documents(count: int, vocab_size: int, seed: int, longest: int = 90) -> list[np.ndarray]:
    """Documents that an order-2 rule makes learnable, each ended by EOD."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        start, step, length = rng.integers(1, vocab_size), rng.integers(1, 5), rng.integers(5, longest)
        ids = 1 + (start + step * np.arange(length)) % (vocab_size - 1)
        documents.append(np.append(ids, EOD))
    return documents


def write_dataset(
    prefix: Path, documents: list[np.ndarray], vocab_size: int = 128, fingerprint: str = "0" * 64
) -> Path:
    """PREFIX.bin, PREFIX.idx and the manifest of `documents`; returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(documents).astype(np.uint16)
    bin_path(prefix).write_bytes(tokens.tobytes())
    lengths = [np.array([len(d) for d in documents], np.int32)]
    with idx_path(prefix).open("wb") as file:
        write_index(file, "uint16", len(documents), len(documents), lengths, [np.ones(len(documents), np.int32)])
    digests = [hashlib.sha256(path(prefix).read_bytes()).hexdigest() for path in (bin_path, idx_path)]
    write_manifest(
        prefix,
        Manifest(
            tool_version="test",
            complete=True,
            dtype="uint16",
            document_count=len(documents),
            sequence_count=len(documents),
            token_count=len(tokens),
            input_bytes=0,
            bin_bytes=bin_path(prefix).stat().st_size,
            idx_bytes=idx_path(prefix).stat().st_size,
            bin_sha256=digests[0],
            idx_sha256=digests[1],
            tokenizer=TokenizerRecord("tiny", "huggingface", fingerprint, vocab_size, EOD, "<eod>"),
            append_eod=True,
            sources=(SourceRecord(prefix.name, 1, len(documents), len(tokens), 1.0),),
        ),
    )
    return prefix
