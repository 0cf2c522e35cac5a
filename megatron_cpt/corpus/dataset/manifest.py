"""The record beside every dataset: what PREFIX.bin holds, who wrote it, and whether it is whole.

A dataset is three files: PREFIX.bin (token ids), PREFIX.idx (lengths and offsets, Megatron's format) and
PREFIX.manifest.json. The manifest is renamed into place last, so its presence means that the other two are
complete; whoever reads a dataset calls `read_manifest` first and gets an error for anything half-written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_cpt.corpus.readers.metadata import json_value
from megatron_cpt.corpus.tokenizers.record import TokenizerRecord
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import DataError

FORMAT_VERSION = 1
ITEM_BYTES = {"uint16": 2, "int32": 4}
_INDEX_HEADER_BYTES = 34  # of PREFIX.idx, whose layout `indexed` describes


@dataclass(frozen=True)
class SourceRecord:
    """What one source of the corpus gave to this dataset."""

    name: str
    files: int
    documents: int
    tokens: int
    share: float  # of the dataset's tokens


@dataclass(frozen=True)
class Manifest:
    """Facts of one dataset. Counts are of this dataset; `rejects` are of the whole run that wrote it."""

    tool_version: str
    complete: bool
    dtype: str  # "uint16" or "int32"
    document_count: int
    sequence_count: int
    token_count: int
    input_bytes: int  # raw bytes read by the run, all splits together
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    tokenizer: TokenizerRecord
    append_eod: bool
    sources: tuple[SourceRecord, ...]
    rejects: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(json_value(asdict(self)), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


@dataclass(frozen=True)
class _StatedRules:
    """Types of what text_rules reads."""

    special_tokens_in_text: Literal["literal", "parse", "reject"] | None = None
    prefix_ids: tuple[int, ...] | None = None
    suffix_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _ReadOfConfig:
    """Types of what this tool reads again of a manifest's `config`; the rest of it is for people."""

    plan: str = ""
    documents_read: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    passages_removed: int = 0
    passage_chars_removed: int = 0
    special_tokens_in_text: Literal["literal", "parse", "reject"] | None = None
    post_processor: bool | None = None
    text_rules: _StatedRules | None = None


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write PREFIX.manifest.json atomically; call it after .bin and .idx have their final names."""
    write_atomically(manifest_path(prefix), manifest.to_json().encode())


def read_manifest(prefix: str | Path) -> Manifest:
    """The manifest of a whole dataset, after an O(1) check of the sizes of its files.

    Raises DataError when the manifest is missing or unreadable, the dataset is incomplete, or a file's size
    is not the recorded one. `verify` (one pass over the data) proves more.
    """
    manifest = _parse(prefix)
    if not manifest.complete:
        raise DataError(
            f"{prefix}: the manifest says that the dataset is incomplete",
            hint="run the same preprocess command again; it continues where it stopped",
        )
    for path, expected_bytes in ((bin_path(prefix), manifest.bin_bytes), (idx_path(prefix), manifest.idx_bytes)):
        if not path.exists():
            raise DataError(f"{path} is missing but {manifest_path(prefix)} describes it", hint="preprocess again")
        if (actual_bytes := path.stat().st_size) != expected_bytes:
            raise DataError(
                f"{path} has {actual_bytes:,} bytes, its manifest says {expected_bytes:,}: the copy is damaged",
                hint="copy it again, or preprocess again with --overwrite",
            )
    return manifest


def manifest_hash(manifest: Manifest) -> str:
    """16 hex digits that change whenever the dataset's content changes: the key for caches built from it."""
    return hashlib.sha256(f"{manifest.bin_sha256} {manifest.idx_sha256}".encode()).hexdigest()[:16]


def _parse(prefix: str | Path) -> Manifest:
    path = manifest_path(prefix)
    if not path.exists():
        raise _why_missing(prefix)
    try:
        data = path.read_bytes()
        version = dict(json.loads(data))["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, this tool reads {FORMAT_VERSION}",
                hint="read it with the version that wrote it, or preprocess again",
            )
        manifest = TypeAdapter(Manifest).validate_json(data, strict=True)
        TypeAdapter(_ReadOfConfig).validate_json(json.dumps(manifest.config), strict=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="check the file and its permissions"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _not_a_manifest(path, f"{place}: {first['msg'].lower()}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_a_manifest(path, repr(error)) from error
    if manifest.dtype not in ITEM_BYTES:
        raise _not_a_manifest(path, f"dtype {manifest.dtype!r} is none of {', '.join(ITEM_BYTES)}")
    if manifest.bin_bytes != manifest.token_count * ITEM_BYTES[manifest.dtype]:
        raise _not_a_manifest(path, f"{manifest.bin_bytes} bytes cannot be {manifest.token_count} {manifest.dtype} ids")
    expected_bytes = _INDEX_HEADER_BYTES + 12 * manifest.sequence_count + 8 * (manifest.document_count + 1)
    if manifest.idx_bytes != expected_bytes:
        counts = f"{manifest.document_count} documents in {manifest.sequence_count} sequences"
        raise _not_a_manifest(path, f"an index of {manifest.idx_bytes} bytes cannot be of {counts}")
    return manifest


def _not_a_manifest(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is not a manifest as this tool writes it: {why}",
        hint="copy the manifest that was written with the dataset, or preprocess again with --overwrite",
    )


def _why_missing(prefix: str | Path) -> DataError:
    """The error for an absent manifest; the ways to get there are different mistakes."""
    if Path(f"{prefix}.partial").exists():
        return DataError(
            f"{prefix}: the dataset is half-written ({prefix}.partial exists)",
            hint="run the same preprocess command again; it continues where it stopped",
        )
    if bin_path(prefix).exists() or idx_path(prefix).exists():
        return DataError(
            f"{prefix}: there is a .bin or .idx but no {manifest_path(prefix).name}: "
            "half-written, or written by another tool",
            hint=f"if Megatron-LM or another tool wrote it: megatron-cpt adopt {prefix} --tokenizer MODEL_DIR; else "
            "preprocess again",
        )
    near = sorted(str(p)[: -len(".manifest.json")] for p in Path(prefix).parent.glob("*.manifest.json"))
    hint = f"datasets in that folder: {', '.join(near[:5])}" if near else "megatron-cpt preprocess writes one"
    return DataError(f"{prefix}: no such dataset ({manifest_path(prefix)} does not exist)", hint=hint)
