"""From parts to datasets: join the parts in unit order, hash while copying, rename the manifest last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cpt import __version__
from megatron_cpt.corpus.files import sync_folder
from megatron_cpt.corpus.indexed import write_index
from megatron_cpt.corpus.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    bin_path,
    idx_path,
    manifest_path,
    write_manifest,
)
from megatron_cpt.corpus.parts import Array, UnitRecord, part_arrays

COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Assembly:
    """What is common to all datasets of one run."""

    staging: Path
    records: Sequence[UnitRecord]  # in unit order
    tokenizer: TokenizerRecord
    dtype: str
    append_eod: bool
    files_per_source: dict[str, int]
    rejects: dict[str, int]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """One of a split's three arrays over all units, re-iterable without holding it."""

    assembly: Assembly
    split: str
    column: int

    def __iter__(self) -> Iterator[Array]:
        for record in self.assembly.records:
            yield part_arrays(
                self.assembly.staging, record.unit, self.split, record.parts[self.split], self.assembly.dtype
            )[self.column]


def write_dataset(assembly: Assembly, split: str, prefix: str) -> Manifest:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.manifest.json; an older dataset there is replaced."""
    counts = [record.parts[split] for record in assembly.records]
    staged_bin, staged_idx = assembly.staging / f"{split}.bin", assembly.staging / f"{split}.idx"
    with staged_bin.open("wb") as file:
        bin_sha256 = _write_hashed(file, _Column(assembly, split, 0))
    with staged_idx.open("wb") as file:
        write_index(
            file,
            assembly.dtype,
            sum(c.sequences for c in counts),
            sum(c.documents for c in counts),
            _Column(assembly, split, 1),
            _Column(assembly, split, 2),
        )
        _flush(file)
    with staged_idx.open("rb") as file:
        idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = Manifest(
        tool_version=__version__,
        complete=True,
        dtype=assembly.dtype,
        document_count=sum(c.documents for c in counts),
        sequence_count=sum(c.sequences for c in counts),
        token_count=sum(c.tokens for c in counts),
        input_bytes=sum(record.size_bytes for record in assembly.records),
        bin_bytes=staged_bin.stat().st_size,
        idx_bytes=staged_idx.stat().st_size,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        tokenizer=assembly.tokenizer,
        append_eod=assembly.append_eod,
        sources=_sources(assembly, split),
        rejects=assembly.rejects,
        config=assembly.config,
    )
    # An old manifest goes first: at no moment does one describe files that are not its own.
    manifest_path(prefix).unlink(missing_ok=True)
    staged_bin.replace(bin_path(prefix))
    staged_idx.replace(idx_path(prefix))
    sync_folder(Path(prefix).parent)
    write_manifest(prefix, manifest)
    return manifest


def _write_hashed(file: BinaryIO, pieces: _Column) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        data = np.ascontiguousarray(piece).view(np.uint8).data
        for start in range(0, len(data), COPY_BYTES):
            block = data[start : start + COPY_BYTES]
            digest.update(block)
            file.write(block)
    _flush(file)
    return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sources(assembly: Assembly, split: str) -> tuple[SourceRecord, ...]:
    total = sum(record.parts[split].tokens for record in assembly.records)
    sources = []
    for name, files in assembly.files_per_source.items():
        own = [record.parts[split] for record in assembly.records if record.source == name]
        tokens = sum(c.tokens for c in own)
        share = round(tokens / total, 6) if total else 0.0
        sources.append(SourceRecord(name, files, sum(c.documents for c in own), tokens, share))
    return tuple(sources)
