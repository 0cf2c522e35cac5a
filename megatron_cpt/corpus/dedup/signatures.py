"""What duplicates are found by: a hash of the normalised text, and MinHash over token 5-grams.

MinHash: Broder 1997; bands of rows as in Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.
Tokens are at hand when a document is written, so shingles are 5-grams of token ids, hashed in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from megatron_cpt.corpus.arrays import Array, mix, sorted_unique
from megatron_cpt.corpus.dedup.minhash import signer

SHINGLE_TOKENS = 5
BANDS, ROWS = 32, 4  # a pair of similarity 0.6 shares a band with probability 0.99, one of 0.3 with 0.23
PERMUTATIONS = BANDS * ROWS
_SEED = 42
_STEP = np.uint64(0x100000001B3)


def exact_keys(texts: Sequence[str]) -> Array:
    """u64[documents, 2]: a 128-bit hash of each text without regard to case and white space."""
    digests = b"".join(xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode()) for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def shingle_hashes(ids: Array, document_tokens: Array) -> tuple[Array, Array]:
    """(hashes of all token 5-grams, first hash of each document and the end).

    A document of fewer tokens has one shingle, of what it has; one without tokens has none.
    """
    spread = mix(ids.astype(np.uint64) + np.uint64(1))
    padded = np.concatenate((spread, np.zeros(SHINGLE_TOKENS - 1, np.uint64)))
    counts = np.where(document_tokens > 0, np.maximum(document_tokens - SHINGLE_TOKENS + 1, 1), 0)
    ends = np.cumsum(counts)
    starts = np.cumsum(document_tokens) - document_tokens
    places = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
    limits = np.repeat(starts + document_tokens, counts)
    hashes = np.zeros(len(places), np.uint64)
    for step in range(SHINGLE_TOKENS):
        token = padded[places + step]
        token[places + step >= limits] = 0  # a short document ends here
        hashes = hashes * _STEP + token
    return mix(hashes), np.concatenate(([0], ends))


def band_keys(ids: Array, document_tokens: Array) -> Array:
    """u64[BANDS, documents]: documents that share a key in a band are candidates."""
    hashes, offsets = shingle_hashes(ids, document_tokens)
    rows = signer()(hashes, offsets, PERMUTATIONS, _SEED).reshape(len(document_tokens), BANDS, ROWS)
    keys = np.zeros((len(document_tokens), BANDS), np.uint64)
    for row in range(ROWS):
        keys = mix(keys * _STEP + rows[:, :, row] + np.uint64(1))
    return np.ascontiguousarray(keys.T)


def similarity(first: Array, second: Array) -> float:
    """Jaccard similarity of two documents' sets of shingles, exact; arguments are their token ids."""
    return jaccard(shingle_set(first), shingle_set(second))


def shingle_set(ids: Array) -> Array:
    """The distinct shingles of a document, sorted."""
    return sorted_unique(shingle_hashes(np.asarray(ids), np.array([len(ids)]))[0])


def jaccard(first: Array, second: Array) -> float:
    """Shared members of two sorted sets, divided by the members of either."""
    both = np.sort(np.concatenate((first, second)))
    shared = int((both[1:] == both[:-1]).sum())
    return shared / max(len(both) - shared, 1)
