"""Document-level split by content: a document's split never depends on what else is in the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash


def split_of(texts: Sequence[str], fractions: Mapping[str, float]) -> list[int]:
    """Index of the split for each text: a hash of the text, as a number in [0, 1), among the summed fractions.

    Equal documents fall into the same split, so an exact duplicate never leaks from train into valid.
    """
    return split_of_hashes([xxhash.xxh3_64_intdigest(text.encode(), seed=1) for text in texts], fractions)


def split_of_hashes(hashes: Sequence[int], fractions: Mapping[str, float]) -> list[int]:
    """Index of the split for each 64-bit hash."""
    bounds = np.cumsum(list(fractions.values()))[:-1]
    return np.searchsorted(bounds, np.array(hashes, np.uint64) / 2.0**64, side="right").tolist()  # type: ignore[no-any-return]
