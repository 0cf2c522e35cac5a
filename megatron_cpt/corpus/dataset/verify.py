"""Everything that can be proven of a dataset in one pass over its bytes, as a list of checks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest, read_manifest
from megatron_cpt.corpus.dataset.soundness import TOKENS_PER_BLOCK, content_checks, index_checks
from megatron_cpt.corpus.dataset.text_rules import text_rules
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer


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
    results = {**index_checks(manifest, reader), **content_checks(manifest, reader)}
    if manifest.append_eod and not any(results.values()):
        results["every document ends with EOD"] = _eod_problems(manifest, reader)
        if text_rules(manifest).text_gives_special_ids is False:
            results["EOD stands nowhere else"] = _inner_eod_problems(manifest, reader)
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path, eod_token=manifest.tokenizer.eod_token, backend="reference")
        damaged = any(results.values())  # then there may be nothing that can be decoded
        found = _tokenizer_problems(manifest, None if damaged else reader, tokenizer)
        results["tokenizer fingerprint; a sample decodes"] = found
    return Verification(prefix, tuple(results), tuple(p for problems in results.values() for p in problems))


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


def _tokenizer_problems(manifest: Manifest, reader: IndexedReader | None, tokenizer: CorpusTokenizer) -> list[str]:
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        return [f"the dataset was written with another tokenizer ({manifest.tokenizer.name})"]
    if reader is None:
        return []
    step = max(1, reader.document_count // 16)
    sample = [reader.document(i)[:512] for i in range(0, reader.document_count, step)]
    broken = [ids for ids in sample if len(ids) > 1 and not tokenizer.decode(ids.tolist())]
    return [f"{len(broken)} of {len(sample)} sample documents decode to nothing"] if broken else []
