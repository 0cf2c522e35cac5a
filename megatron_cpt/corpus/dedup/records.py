"""The map stage of duplicate detection: what each unit leaves about its documents.

    000012.documents.npy   one row per document of all splits: split, path, place, low half of the exact key, and the
                           tokens before it in the part of its split and of its own
    000012.keys.npy        u64[kinds, documents]: keys of each kind, sorted
    000012.order.npy       u32[kinds, documents]: the document of each sorted key

Kinds are exact, id and the bands of near-duplicates, as far as the corpus asks for them. Sorted keys let a later
stage read a range of keys of all units without holding the rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megatron_cpt.corpus.arrays import Array, save_array
from megatron_cpt.corpus.dedup.signatures import BANDS, band_keys, exact_keys
from megatron_cpt.corpus.documents import Batch, Encoded
from megatron_cpt.corpus.schema_processing import Dedup

NO_KEY = (1 << 64) - 1  # never compared
DOCUMENT = np.dtype(
    [
        ("split", np.uint8), ("path", np.uint32), ("place", np.uint32), ("check", np.uint64),
        ("first_token", np.uint64), ("tokens", np.uint32),
    ]
)  # fmt: skip


def key_kinds(dedup: Dedup) -> list[str]:
    """Names of the rows of keys.npy, in the order in which they are resolved."""
    kinds = ["id"] if dedup.id_key else []
    kinds += ["exact"] if dedup.exact else []
    return kinds + ([f"near{band}" for band in range(BANDS)] if dedup.near else [])


@dataclass
class RecordWriter:
    """Collects the records of one unit; `save` leaves the three files."""

    dedup: Dedup
    _documents: list[Array] = field(default_factory=list)
    _keys: list[Array] = field(default_factory=list)
    _tokens: Counter[int] = field(default_factory=Counter)  # so far, by split

    def add(self, batch: Batch, encoded: Encoded, split: Array, path_index: int) -> None:
        documents = np.zeros(len(batch), DOCUMENT)
        documents["split"], documents["path"], documents["place"] = split, path_index, batch.places
        documents["tokens"] = tokens = encoded.document_tokens()
        for index in np.unique(split).tolist():
            mine = split == index
            ends = self._tokens[index] + np.cumsum(tokens[mine])
            documents["first_token"][mine] = ends - tokens[mine]
            self._tokens[index] = int(ends[-1])
        exact = exact_keys(batch.texts)
        documents["check"] = exact[:, 1]
        rows = []
        if self.dedup.id_key:
            assert batch.metadata is not None
            rows.append(_id_keys([entry[self.dedup.id_key] for entry in batch.metadata]))
        if self.dedup.exact:
            rows.append(exact[None, :, 0])
        if self.dedup.near:
            rows.append(band_keys(encoded.ids, tokens))
        self._documents.append(documents)
        self._keys.append(np.concatenate(rows))

    def save(self, folder: Path, unit: str) -> None:
        kinds = len(key_kinds(self.dedup))
        keys = np.concatenate(self._keys, axis=1) if self._keys else np.empty((kinds, 0), np.uint64)
        documents = np.concatenate(self._documents) if self._documents else np.empty(0, DOCUMENT)
        order = np.argsort(keys, axis=1, kind="stable")
        save_array(folder / f"{unit}.documents.npy", documents)
        save_array(folder / f"{unit}.keys.npy", np.take_along_axis(keys, order, axis=1))
        save_array(folder / f"{unit}.order.npy", order.astype(np.uint32))


def _id_keys(ids: list[object]) -> Array:
    """Keys of the documents' ids; NO_KEY for a document without one, or with an empty one as csv has it."""
    keys = [
        NO_KEY
        if value is None or (isinstance(value, str) and not value.strip())
        else xxhash.xxh3_64_intdigest(repr(value).encode())
        for value in ids
    ]
    return np.array([keys], np.uint64)


@dataclass(frozen=True)
class UnitRecords:
    """The records of one unit, mapped."""

    documents: Array
    keys: Array
    order: Array


def load_records(folder: Path, unit: str) -> UnitRecords:
    return UnitRecords(
        load_documents(folder, unit), *(_load(folder / f"{unit}.{name}.npy") for name in ("keys", "order"))
    )


def load_documents(folder: Path, unit: str) -> Array:
    """The rows of `DOCUMENT`, mapped."""
    return _load(folder / f"{unit}.documents.npy")


def _load(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode=None if path.stat().st_size < 1 << 16 else "r")
    return array
