"""Document-level split by content: a document's split never depends on what else is in the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from megatron_cpt.corpus.dataset.manifest import Manifest
from megatron_cpt.corpus.dataset.select import ChosenDocuments, write_chosen
from megatron_cpt.corpus.dataset.soundness import open_proven
from megatron_cpt.corpus.dataset.writer import refuse_existing
from megatron_cpt.errors import DataError


def split_of(texts: Sequence[str], fractions: Mapping[str, float]) -> list[int]:
    """Index of the split for each text: a hash of the text, as a number in [0, 1), among the summed fractions.

    Equal documents fall into the same split, so an exact duplicate never leaks from train into valid.
    """
    return split_of_hashes([xxhash.xxh3_64_intdigest(text.encode(), seed=1) for text in texts], fractions)


def split_of_hashes(hashes: Sequence[int], fractions: Mapping[str, float]) -> list[int]:
    """Index of the split for each 64-bit hash."""
    bounds = np.cumsum(list(fractions.values()))[:-1]
    return np.searchsorted(bounds, np.array(hashes, np.uint64) / 2.0**64, side="right").tolist()  # type: ignore[no-any-return]


def split_dataset(prefix: str, fractions: Mapping[str, float], *, overwrite: bool = False) -> dict[str, Manifest]:
    """Write PREFIX_NAME for each name, documents chosen by a hash of their ids; PREFIX stays.

    No tokenizer is needed.

    Raises:
        DataError: PREFIX is damaged, a split gets no document, or its dataset exists already.
    """
    [manifest], [reader] = open_proven([prefix])
    hashes = [xxhash.xxh3_64_intdigest(ids.tobytes(), seed=1) for ids in reader]
    owner = np.array(split_of_hashes(hashes, fractions))
    for index, name in enumerate(fractions):
        refuse_existing(f"{prefix}_{name}", overwrite)
        if not (owner == index).any():
            raise DataError(f"split {name!r} gets no document", hint="give it a larger fraction")
    return {
        f"{prefix}_{name}": write_chosen(
            f"{prefix}_{name}", [ChosenDocuments(reader, manifest, owner == index)], rejects={}
        )
        for index, name in enumerate(fractions)
    }
