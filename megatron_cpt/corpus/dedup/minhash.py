"""Signatures of near-duplicates: equal places of two signatures estimate the Jaccard similarity of their documents.

A fast similarity sketch (Dahlgaard, Knudsen, Thorup 2017, arXiv:1704.04370). In each of three rounds every shingle
falls into one place of the signature, and a place keeps the smallest (round, rank) that fell into it; a place that
stays empty takes the classical MinHash over all shingles (Broder 1997). `rensa` 0.5 computes the same in Rust, about
four times faster; it is used where it is installed and gives these very numbers, so that a corpus has the same
duplicates on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Signer = Callable[[npt.NDArray[np.uint64], npt.NDArray[np.int64], int, int], npt.NDArray[np.uint64]]

_WORD = (1 << 64) - 1
_EMPTY = (1 << 32) - 1  # every place of a document without shingles
_ROUNDS, _RANK_BITS = 3, 30  # a value is its round, above the 30 bits of its rank
_FALLBACK = _ROUNDS << _RANK_BITS
# Separate the hash functions of the rounds and of the fallback; rensa's constants (digits of square roots).
_BUCKET_DOMAIN, _ROUND_DOMAIN, _FALLBACK_DOMAIN = 0x6A09E667F3BCC909, 0x3C6EF372FE94F82B, 0xBB67AE8584CAA73B
_CHUNK_SHINGLES = 1 << 16  # hashed at once: bounds the memory of the numpy path to a few megabytes


def signer() -> Signer:
    """A function from (shingle hashes, first shingle of each document and the end, values, seed) to signatures.

    The result is u64[documents, values], each below 2^32. rensa's when it is there and right, else numpy's.
    """
    return _chosen()


@cache
def _chosen() -> Signer:
    try:
        sample = np.arange(1, 1500, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        check = (sample, np.array([0, 1, 1, 20, 80, len(sample)]), 128, 7)
        if np.array_equal(rensa_signatures(*check), numpy_signatures(*check)):
            return rensa_signatures
        reason = "its signatures differ from the reference, as those of rensa 0.4 do"
    except Exception as error:  # a native library: whatever it raises, numpy still works
        reason = f"it cannot be loaded ({error})"
    log.warning("rensa is not used: %s. Signatures of near-duplicates come from numpy, about 4x slower.", reason)
    return numpy_signatures


def rensa_signatures(
    hashes: npt.NDArray[np.uint64], offsets: npt.NDArray[np.int64], values: int, seed: int
) -> npt.NDArray[np.uint64]:
    """`signer`'s result by the Rust library."""
    import rensa

    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.tolist(), values, seed)
    return np.array(matrix.to_rows(), np.uint64).reshape(len(offsets) - 1, values)


def numpy_signatures(
    hashes: npt.NDArray[np.uint64], offsets: npt.NDArray[np.int64], values: int, seed: int
) -> npt.NDArray[np.uint64]:
    """`signer`'s result by its definition; `values` is a power of two."""
    if values & (values - 1):
        raise ValueError(f"{values} values of a signature: not a power of two")
    parameters = hash_parameters(values, seed)
    signatures = np.full((len(offsets) - 1, values), _EMPTY, np.uint64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    for first in range(0, len(hashes), _CHUNK_SHINGLES):
        chunk = slice(first, first + _CHUNK_SHINGLES)
        _bucket_rounds(signatures, hashes[chunk], rows[chunk], parameters[0][1])
    short = np.flatnonzero((signatures >= _FALLBACK).any(axis=1))
    for row in short[np.diff(offsets)[short] > 0]:
        shingles = splitmix64(hashes[offsets[row] : offsets[row + 1]] ^ np.uint64(parameters[0][0] ^ _FALLBACK_DOMAIN))
        factors, summands = np.array(parameters, np.uint64).T
        smallest = np.full(values, _EMPTY, np.uint64)
        for part in range(0, len(shingles), 1024):
            hashed = np.multiply.outer(shingles[part : part + 1024], factors) + summands
            smallest = np.minimum(smallest, (hashed >> np.uint64(32)).min(axis=0))
        fallback = np.uint64(_FALLBACK) | (smallest >> np.uint64(32 - _RANK_BITS))
        signatures[row] = np.minimum(signatures[row], fallback)
    return signatures


def _bucket_rounds(
    signatures: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64], seed: int
) -> None:
    """Lower the places of `signatures` to the values of these shingles, which belong to `rows`."""
    values = signatures.shape[1]
    shift = np.uint64(32 - (values.bit_length() - 1))
    for number in range(_ROUNDS):
        mixed = splitmix64(hashes ^ np.uint64(seed ^ _BUCKET_DOMAIN ^ (number * _ROUND_DOMAIN & _WORD)))
        place = (mixed & np.uint64(_EMPTY)) >> shift
        value = np.uint64(number << _RANK_BITS) | (mixed >> np.uint64(64 - _RANK_BITS))
        np.minimum.at(signatures, (rows, place.astype(np.int64)), value)


def splitmix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of the generator SplitMix64 (Steele, Lea, Flood 2014), on each word."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_parameters(values: int, seed: int) -> list[tuple[int, int]]:
    """(a, b) of each hash: xoshiro256++ with its state filled by splitmix64 from the seed."""
    steps = np.arange(4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = [int(word) for word in splitmix64(np.uint64(seed) + steps)]
    return [(_next(state) | 1, _next(state)) for _ in range(values)]


def _next(state: list[int]) -> int:
    """The next 64 bits of xoshiro256++; advances `state`."""
    result = (_rotated((state[0] + state[3]) & _WORD, 23) + state[0]) & _WORD
    shifted = (state[1] << 17) & _WORD
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= shifted
    state[3] = _rotated(state[3], 45)
    return result


def _rotated(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (64 - bits))) & _WORD
