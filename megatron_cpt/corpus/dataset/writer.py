"""The last step of every tool that makes a dataset: stream the columns out, hash, rename, manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.columns import (
    Column,
    OpenSelections,
    kept_ids,
    kept_sequence_lengths,
    kept_sequences_per_document,
)
from megatron_cpt.corpus.dataset.indexed import write_index
from megatron_cpt.corpus.dataset.manifest import Manifest, bin_path, idx_path, manifest_path, write_manifest
from megatron_cpt.durable import flush_to_disk, sync
from megatron_cpt.errors import DataError

COPY_BYTES = 8 << 20


def in_the_way(prefix: str, of_what: str = "") -> DataError:
    """The error for a dataset that stands where another one is to be written."""
    return DataError(
        f"{prefix}: there is already a dataset{of_what}", hint="choose another --output-prefix, or give --overwrite"
    )


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise DataError when `prefix` has a dataset that may not be replaced, or names a folder and no files."""
    if prefix.endswith("/") or not prefix:
        raise DataError(
            f"output prefix {prefix!r} is a folder", hint="add the name that the files begin with, such as out/joined"
        )
    if manifest_path(prefix).exists() and not overwrite:
        raise in_the_way(prefix)


def write_files(
    staging: Path,
    name: str,
    prefix: str,
    template: Manifest,
    selections: OpenSelections,
) -> Manifest:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.manifest.json; an older dataset there is replaced.

    `template` has the counts of the documents that `selections` keep; sizes and hashes are filled in here.
    """
    staged_bin, staged_idx = staging / f"{name}.bin", staging / f"{name}.idx"
    with staged_bin.open("wb") as file:
        bin_sha256 = _write_hashed(file, Column(selections, kept_ids))
    with staged_idx.open("wb") as file:
        counts = template.sequence_count, template.document_count
        lengths = Column(selections, kept_sequence_lengths)
        write_index(file, template.dtype, *counts, lengths, Column(selections, kept_sequences_per_document))
        flush_to_disk(file)
    with staged_idx.open("rb") as file:
        idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = replace(
        template,
        bin_bytes=staged_bin.stat().st_size,
        idx_bytes=staged_idx.stat().st_size,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
    )
    # An old manifest goes first: at no moment does one describe files that are not its own.
    manifest_path(prefix).unlink(missing_ok=True)
    staged_bin.replace(bin_path(prefix))
    staged_idx.replace(idx_path(prefix))
    sync(Path(prefix).parent)
    write_manifest(prefix, manifest)
    return manifest


def _write_hashed(file: BinaryIO, pieces: Iterable[Array]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        data = np.ascontiguousarray(piece).view(np.uint8).data if len(piece) else memoryview(b"")
        for start in range(0, len(data), COPY_BYTES):
            block = data[start : start + COPY_BYTES]
            digest.update(block)
            file.write(block)
    flush_to_disk(file)
    return digest.hexdigest()
