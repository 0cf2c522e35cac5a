"""Whether the bytes of a dataset are what its manifest says, for all that read it; a damaged one is refused.

`open_dataset` proves the index, in time that grows with the number of sequences. `open_proven` reads every byte as
well: what is copied from a dataset must be what was written to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest, idx_path, read_manifest
from megatron_cpt.errors import DataError

TOKENS_PER_BLOCK = 8 << 20
INDEX_ENTRIES_PER_BLOCK = 1 << 20

Checks = dict[str, list[str]]  # what was looked at -> the problems found, none where it is sound


def open_dataset(prefix: str) -> tuple[Manifest, IndexedReader]:
    """Map the dataset `prefix` and read its manifest.

    Raises:
        DataError: a file is missing or not of this format, or the index does not fit to .bin or to the manifest.
    """
    manifest, reader = read_manifest(prefix), open_indexed(prefix)
    refuse_damage(prefix, index_checks(manifest, reader))
    return manifest, reader


def open_proven(prefixes: Sequence[str]) -> tuple[list[Manifest], list[IndexedReader]]:
    """Map datasets of which every byte is what was written, and read their manifests.

    Raises:
        DataError: as `open_dataset`, which is asked of all of them first; or an id is outside the vocabulary, or the
            content of a file is not that of its sha256.
    """
    opened = [open_dataset(prefix) for prefix in prefixes]
    for prefix, (manifest, reader) in zip(prefixes, opened, strict=True):
        refuse_damage(prefix, content_checks(manifest, reader))
    return [manifest for manifest, _ in opened], [reader for _, reader in opened]


def refuse_damage(name: str, checks: Checks) -> None:
    """Raise DataError for the dataset `name` when a check found a problem."""
    if problems := [problem for found in checks.values() for problem in found]:
        raise not_sound(name, problems)


def not_sound(name: str, problems: Iterable[str]) -> DataError:
    """The error for a damaged dataset."""
    return DataError(f"{name} is not sound: {'; '.join(problems)}", hint="copy it again, or preprocess again")


def index_checks(manifest: Manifest, reader: IndexedReader) -> Checks:
    """What the index and the sizes of the files tell."""
    return {
        "counts equal the manifest's": _count_problems(manifest, reader),
        "sequences lie in .bin without gap or overlap": offset_problems(reader),
        "documents cover all sequences in order": document_problems(reader),
    }


def content_checks(manifest: Manifest, reader: IndexedReader) -> Checks:
    """What a pass over both files tells, and the rest of the manifest."""
    with idx_path(reader.prefix).open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == manifest.idx_sha256
    of_sources = sum(source.tokens for source in manifest.sources)
    adds_up = of_sources == manifest.token_count
    return {
        "tokens of the sources add up": [] if adds_up else [f"the sources have {of_sources:,} tokens in the manifest"],
        "ids are below the vocabulary size; sha256 of .bin": _bin_problems(manifest, reader),
        "sha256 of .idx": [] if same else ["the content of .idx is not what was written"],
    }


def _count_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    pairs = {
        "dtype": (reader.dtype, manifest.dtype),
        "sequences": (reader.sequence_count, manifest.sequence_count),
        "documents": (reader.document_count, manifest.document_count),
        "tokens": (reader.token_count, manifest.token_count),
    }
    return [
        f"{name}: {found} found, {stated} in the manifest" for name, (found, stated) in pairs.items() if found != stated
    ]


def foreign_id(ids: Array, vocab_size: int) -> int | None:
    """An id outside of a vocabulary, None where all are inside."""
    if not len(ids):
        return None
    low, high = int(ids.min()), int(ids.max())
    return low if low < 0 else high if high >= vocab_size else None


def offset_problems(reader: IndexedReader) -> list[str]:
    """Where the sequences do not lie in .bin one after the other."""
    end, item_bytes = 0, reader.tokens.itemsize
    for first, lengths, pointers in _sequence_blocks(reader):
        if (lengths <= 0).any():
            return [f"sequence {first + int(np.argmax(lengths <= 0))} has no tokens"]
        ends = end + np.cumsum(lengths) * item_bytes
        if (wrong := ends - lengths * item_bytes != pointers).any():
            return [f"sequence {first + int(np.argmax(wrong))} points to the wrong byte"]
        end = int(ends[-1])
    if end != reader.token_count * item_bytes:
        return [f".bin holds {reader.token_count:,} tokens, the sequences {end // item_bytes:,}"]
    return []


def _sequence_blocks(reader: IndexedReader) -> Iterator[tuple[int, Array, Array]]:
    """Neighbouring sequences: the number of the first, their tokens (int64) and where they begin in .bin (bytes)."""
    for first in range(0, reader.sequence_count, INDEX_ENTRIES_PER_BLOCK):
        block = slice(first, first + INDEX_ENTRIES_PER_BLOCK)
        yield first, reader.sequence_lengths[block].astype(np.int64), reader.sequence_pointers[block]


def document_problems(reader: IndexedReader) -> list[str]:
    """Where the documents do not cover all sequences in order."""
    indices = reader.document_indices
    whole = len(indices) and indices[0] == 0 and indices[-1] == reader.sequence_count
    return [] if whole and _ascending(indices) else ["the document indices do not cover the sequences"]


def _ascending(indices: Array) -> bool:
    blocks = range(0, len(indices), INDEX_ENTRIES_PER_BLOCK)
    return all((np.diff(indices[first : first + INDEX_ENTRIES_PER_BLOCK + 1]) >= 0).all() for first in blocks)


def _bin_problems(manifest: Manifest, reader: IndexedReader) -> list[str]:
    problems, digest = [], hashlib.sha256()
    for start in range(0, reader.token_count, TOKENS_PER_BLOCK):
        block = reader.tokens[start : start + TOKENS_PER_BLOCK]
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
        if (wrong := foreign_id(block, manifest.tokenizer.vocab_size)) is not None:
            problems.append(f"id {wrong} near token {start:,} is outside the vocabulary")
    if digest.hexdigest() != manifest.bin_sha256:
        problems.append("the content of .bin is not what was written (sha256 differs)")
    return problems
