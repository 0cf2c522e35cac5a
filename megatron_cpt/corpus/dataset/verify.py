"""Proof of a dataset in one pass over its bytes, and a description of what it holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest, idx_path, read_manifest
from megatron_cpt.corpus.dataset.text_rules import text_rules
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer
from megatron_cpt.errors import DataError

TOKENS_PER_BLOCK = 8 << 20


@dataclass(frozen=True)
class Verification:
    """The checks made, in order, and every problem found."""

    prefix: str
    checks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_dataset(prefix: str, tokenizer_path: str | None = None) -> Verification:
    """Check sizes, offsets, counts, ids, EOD and hashes of a dataset against its manifest.

    With a tokenizer, also its fingerprint and that a sample of documents decodes. Raises DataError only for what
    `read_manifest` and `open_indexed` refuse; everything else is listed in the result.
    """
    manifest = read_manifest(prefix)
    reader = open_indexed(prefix)
    results = {
        "counts equal the manifest's": _count_problems(manifest, reader),
        "sequences lie in .bin without gap or overlap": offset_problems(reader),
        "documents cover all sequences in order": document_problems(reader),
    }
    results["ids are below the vocabulary size; sha256 of .bin"] = _bin_problems(manifest, reader)
    with idx_path(prefix).open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == manifest.idx_sha256
    results["sha256 of .idx"] = [] if same else ["the content of .idx is not what was written"]
    if manifest.append_eod and not any(results.values()):
        results["every document ends with EOD"] = _eod_problems(manifest, reader)
        if text_rules(manifest).text_gives_special_ids is False:
            results["EOD stands nowhere else"] = _inner_eod_problems(manifest, reader)
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path, eod_token=manifest.tokenizer.eod_token, backend="reference")
        results["tokenizer fingerprint; a sample decodes"] = _tokenizer_problems(manifest, reader, tokenizer)
    return Verification(prefix, tuple(results), tuple(p for problems in results.values() for p in problems))


def _count_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    pairs = {
        "dtype": (reader.dtype, manifest.dtype),
        "sequences": (reader.sequence_count, manifest.sequence_count),
        "documents": (reader.document_count, manifest.document_count),
        "tokens": (reader.token_count, manifest.token_count),
        "tokens of the sources": (sum(s.tokens for s in manifest.sources), manifest.token_count),
    }
    return [
        f"{name}: {found} found, {stated} in the manifest" for name, (found, stated) in pairs.items() if found != stated
    ]


def offset_problems(reader: IndexedReader) -> list[str]:
    """Where the sequences do not lie in .bin one after the other."""
    lengths = np.asarray(reader.sequence_lengths, np.int64)
    if (lengths <= 0).any():
        return [f"sequence {int(np.argmax(lengths <= 0))} has no tokens"]
    ends = np.cumsum(lengths) * reader.tokens.itemsize
    starts = ends - lengths * reader.tokens.itemsize
    if (wrong := starts != reader.sequence_pointers).any():
        return [f"sequence {int(np.argmax(wrong))} points to the wrong byte"]
    if len(ends) and ends[-1] != reader.token_count * reader.tokens.itemsize:
        return [f".bin holds {reader.token_count:,} tokens, the sequences {int(lengths.sum()):,}"]
    return []


def document_problems(reader: IndexedReader) -> list[str]:
    """Where the documents do not cover all sequences in order."""
    indices = reader.document_indices
    whole = len(indices) and indices[0] == 0 and indices[-1] == reader.sequence_count
    return [] if whole and (np.diff(indices) >= 0).all() else ["the document indices do not cover the sequences"]


def _bin_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    problems, digest = [], hashlib.sha256()
    for start in range(0, reader.token_count, TOKENS_PER_BLOCK):
        block = reader.tokens[start : start + TOKENS_PER_BLOCK]
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= manifest.tokenizer.vocab_size:
            problems.append(f"id {low if low < 0 else high} near token {start:,} is outside the vocabulary")
    if digest.hexdigest() != manifest.bin_sha256:
        problems.append("the content of .bin is not what was written (sha256 differs)")
    return problems


def _eod_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    filled = np.diff(reader.document_indices) > 0
    last = reader.document_indices[1:][filled] - 1
    ends = reader.sequence_pointers[last] // reader.tokens.itemsize + reader.sequence_lengths[last] - 1
    wrong = int((reader.tokens[ends] != manifest.tokenizer.eod_id).sum()) if len(ends) else 0
    return [f"{wrong:,} documents do not end with EOD {manifest.tokenizer.eod_id}"] if wrong else []


def _inner_eod_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    """With one EOD at the end of each document, any further one stands inside of a document."""
    found = 0
    for start in range(0, reader.token_count, TOKENS_PER_BLOCK):
        found += int((reader.tokens[start : start + TOKENS_PER_BLOCK] == manifest.tokenizer.eod_id).sum())
    inner = found - int((np.diff(reader.document_indices) > 0).sum())
    return [f"EOD {manifest.tokenizer.eod_id} stands {inner:,} times before the end of a document"] if inner else []


def _tokenizer_problems(manifest: Manifest, reader: IndexedReader, tokenizer: CorpusTokenizer) -> list[str]:
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        return [f"the dataset was written with another tokenizer ({manifest.tokenizer.name})"]
    step = max(1, reader.document_count // 16)
    sample = [reader.document(i)[:512] for i in range(0, reader.document_count, step)]
    broken = [ids for ids in sample if len(ids) > 1 and not tokenizer.decode(ids.tolist())]
    return [f"{len(broken)} of {len(sample)} sample documents decode to nothing"] if broken else []


def describe_dataset(prefix: str, documents: int = 0, tokenizer_path: str | None = None) -> dict[str, Any]:
    """Manifest, length statistics, and the first documents (ids at both ends; text with a tokenizer)."""
    manifest, reader = read_manifest(prefix), open_indexed(prefix)
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
    percentiles = {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95)}
    return {
        "prefix": prefix,
        "manifest": manifest,
        "document_tokens": {"min": int(lengths.min()), **percentiles, "max": int(lengths.max())},
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
