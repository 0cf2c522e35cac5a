"""Signatures of near-duplicates: numpy's are rensa's, and a corpus has the same duplicates without rensa."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from megatron_cpt.corpus.dedup import minhash
from megatron_cpt.corpus.dedup.minhash import numpy_signatures, rensa_signatures, signer
from megatron_cpt.corpus.dedup.signatures import band_keys


def shingles(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    hashes = rng.integers(0, 2**64, sum(lengths), dtype=np.uint64)
    return hashes, np.concatenate(([0], np.cumsum(lengths)))


@pytest.mark.parametrize(
    "lengths", [(0,), (1,), (0, 5, 0, 33, 0), (200, 31, 32, 33), (1000, 700, 3), (70_000, 2, 140_000)], ids=str
)
def test_numpys_signatures_are_rensas(lengths: tuple[int, ...]) -> None:
    hashes, offsets = shingles(*lengths)
    for values, seed in ((128, 42), (16, 7), (1, 0)):
        expected = rensa_signatures(hashes, offsets, values, seed)
        assert np.array_equal(numpy_signatures(hashes, offsets, values, seed), expected)
    if hashes.size > 1:  # the comparison sees a single changed shingle
        hashes[0] ^= np.uint64(1)
        assert not np.array_equal(
            numpy_signatures(hashes, offsets, 128, 42), rensa_signatures(hashes + 1, offsets, 128, 42)
        )


def test_without_rensa_the_band_keys_are_the_same_and_a_line_says_that_it_is_slower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = np.random.default_rng(3).integers(0, 5000, 3000).astype(np.int32)
    documents = np.array([1200, 0, 3, 1797])
    minhash._chosen.cache_clear()
    assert signer() is rensa_signatures
    with_rensa = band_keys(ids, documents)

    monkeypatch.setitem(sys.modules, "rensa", None)
    minhash._chosen.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(band_keys(ids, documents), with_rensa)
    assert signer() is numpy_signatures
    assert "rensa is not used" in caplog.text and "slower" in caplog.text
    minhash._chosen.cache_clear()


def test_a_rensa_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "rensa_signatures", lambda *a: numpy_signatures(*a) + np.uint64(1))
    minhash._chosen.cache_clear()
    assert signer() is numpy_signatures
    minhash._chosen.cache_clear()
