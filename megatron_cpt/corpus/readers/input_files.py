"""The files of a source: folders and globs expanded in a fixed order, and the format of each by its name."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.corpus.readers.compression import COMPRESSED_SUFFIXES
from megatron_cpt.corpus.readers.unit import FileFormat
from megatron_cpt.corpus.schema import Source
from megatron_cpt.errors import DataError

_SUFFIXES: dict[FileFormat, str] = {
    "jsonl": ".jsonl .json .ndjson",
    "parquet": ".parquet",
    "arrow": ".arrow .feather",
    "html": ".html .htm .xhtml",
    "text": ".txt .md .rst .tex .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx "
    ".go .rs .rb .php .cs .swift .m .r .jl .lua .pl .sh .bash .sql .css .yaml .yml .toml .cmake .f90 .hs .ml .v .vhd",
}
FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Small files that datasets.save_to_disk leaves beside its Arrow files.
_SAVE_TO_DISK_FILES = frozenset({"state.json", "dataset_info.json"})


@dataclass(frozen=True)
class InputFile:
    path: str
    format: FileFormat
    size_bytes: int


def find_files(source: Source) -> list[InputFile]:
    """The files of a source in a fixed order: as listed, a folder or a glob in sorted order."""
    found: list[InputFile] = []
    for pattern in source.files:
        matches = list(_expand(pattern, source))
        if not matches:
            raise DataError(
                f"source {source.name!r}: {pattern} matches no file",
                hint="paths are relative to the working directory; known names end in "
                ".jsonl .parquet .arrow .txt .md .html and those of code, also with .gz .zst .bz2 .xz",
            )
        found += matches
    return found


def _expand(pattern: str, source: Source) -> Iterator[InputFile]:
    path = Path(pattern)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise DataError(
                f"{path} holds several splits",
                hint=f"name one: {', '.join(sorted(str(p) for p in path.iterdir() if p.is_dir()))}",
            )
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        known = [p for p in inside if source.format != "auto" or _format_of(p) is not None]
        yield from (_input_file(p, source) for p in known)
    elif path.is_file():
        yield _input_file(path, source)
    else:
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        for name in sorted(names):
            if Path(name).is_file():
                yield _input_file(Path(name), source)


def _input_file(path: Path, source: Source) -> InputFile:
    file_format = source.format if source.format != "auto" else _format_of(path)
    if file_format is None:
        raise DataError(
            f"{path}: cannot tell its format from its name",
            hint=f"state format: for source {source.name!r}; one of jsonl parquet arrow text html",
        )
    return InputFile(str(path), file_format, path.stat().st_size)


def _is_hidden(path: Path) -> bool:
    return path.name in _SAVE_TO_DISK_FILES or any(part.startswith(".") for part in path.parts)


def _format_of(path: Path) -> FileFormat | None:
    """Format by the suffix, looking through a compression suffix."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
    return FORMAT_OF_SUFFIX.get(suffix.lower())
