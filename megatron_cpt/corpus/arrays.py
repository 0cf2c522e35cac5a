"""numpy arrays as all rooms of the corpus use them: their type, sets of 64-bit keys, files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.durable import durable_file

Array = np.ndarray[Any, np.dtype[Any]]


def mix(values: Array) -> Array:
    """Spread the bits of 64-bit integers (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))  # type: ignore[no-any-return]


def repeats(keys: Array) -> Array:
    """True where the key occurred at a lower index."""
    out = np.zeros(len(keys), bool)
    ordered = np.sort(keys)  # plain sorting is several times as fast as a stable argsort, and repeats are rare
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        places = np.flatnonzero(np.isin(keys, sorted_unique(twice)))
        few = keys[places]
        order = np.argsort(few, kind="stable")
        same = np.zeros(len(few), bool)
        same[1:] = few[order[1:]] == few[order[:-1]]
        out[places[order]] = same
    return out


def sorted_unique(values: Array) -> Array:
    """As np.unique, which for 64-bit integers is slower than this."""
    ordered = np.sort(values)
    keep = np.ones(len(ordered), bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    unique: Array = ordered[keep]
    return unique


def save_array(path: Path, array: Array) -> None:
    """A .npy file that is whole and on the disk when it has its name."""
    with durable_file(path) as file:
        np.save(file, array)
