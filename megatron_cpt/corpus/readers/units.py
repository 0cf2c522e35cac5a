"""From a corpus description to units of work: files found, their formats, and ranges that workers read.

A unit is the smallest thing a worker takes and the smallest thing that a resumed run repeats. The list of
units depends only on the input, never on the number of workers or shards, which is why the output does not.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cpt.corpus.readers.compression import COMPRESSED_SUFFIXES
from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.errors import DataError

FileFormat = Literal["jsonl", "parquet", "arrow", "text", "html"]
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

MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_WANTED = 1 << 20, 16 << 20, 64
# A file that cannot be entered in the middle is cut into blocks while it is read; see blocks.
MIN_BLOCK_BYTES = 4 << 20
# A row group of Parquet is left whole up to this many units.
UNITS_PER_ROW_GROUP = 4


@dataclass(frozen=True)
class InputFile:
    path: str
    format: FileFormat
    size_bytes: int


@dataclass(frozen=True)
class Unit:
    """A part of one source. `start` and `stop`: byte range (jsonl), row groups (parquet), else the whole files.

    A stream (`block_bytes` > 0) is planned as one unit and becomes one unit per block while it is read.
    """

    index: int
    source: str
    format: FileFormat
    text_field: str
    metadata: tuple[str, ...]
    paths: tuple[str, ...]  # several for whole-file documents, else one
    start: int
    stop: int
    size_bytes: int  # input bytes, for progress
    block_bytes: int = 0  # decoded bytes of a block, about; 0: not a stream
    data: str = ""  # of a block: the file that holds it, as lines or as an Arrow stream


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


def plan_units(corpus: Corpus) -> list[Unit]:
    """All units of the corpus in output order. Raises DataError when there is nothing to read."""
    files = [(source, file) for source in corpus.sources for file in find_files(source)]
    total_bytes = sum(file.size_bytes for _, file in files)
    if total_bytes == 0:
        raise DataError(f"the corpus is empty: {len(files)} file(s), 0 bytes", hint="check the input files")
    unit_bytes = min(max(total_bytes // UNITS_WANTED, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    for source in corpus.sources:
        own = [file for owner, file in files if owner is source]
        for paths, file_format, start, stop, size, block in _cut(own, unit_bytes):
            place = (paths, start, stop, size, block)
            units.append(Unit(len(units), source.name, file_format, source.text, source.metadata, *place))
    return units


Cut = tuple[tuple[str, ...], FileFormat, int, int, int, int]  # paths, format, start, stop, size, block_bytes


def _cut(files: list[InputFile], unit_bytes: int) -> Iterator[Cut]:
    """Units of one source: ranges of a large file, groups of small text files."""
    group: list[InputFile] = []
    for file in files:
        if file.format in ("text", "html"):
            if group and group[0].format != file.format:
                yield _group(group)
                group = []
            group.append(file)
            if sum(member.size_bytes for member in group) >= unit_bytes:
                yield _group(group)
                group = []
            continue
        if group:
            yield _group(group)
            group = []
        yield from _ranges(file, unit_bytes)
    if group:
        yield _group(group)


def _group(files: list[InputFile]) -> Cut:
    size = sum(file.size_bytes for file in files)
    return tuple(file.path for file in files), files[0].format, 0, len(files), size, 0


def _ranges(file: InputFile, unit_bytes: int) -> Iterator[Cut]:
    block_bytes = max(unit_bytes, MIN_BLOCK_BYTES)
    if file.format == "arrow" or file.path.endswith(COMPRESSED_SUFFIXES):
        is_stream = file.size_bytes > unit_bytes
        yield (file.path,), file.format, 0, file.size_bytes, file.size_bytes, block_bytes * is_stream
        return
    if file.format == "jsonl":
        for start in range(0, file.size_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.size_bytes)
            yield (file.path,), file.format, start, stop, stop - start, 0
        return
    from megatron_cpt.corpus.readers.columnar import row_group_ranges

    for start, stop, compressed, uncompressed in row_group_ranges(file.path, unit_bytes):
        is_stream = stop == start + 1 and uncompressed > UNITS_PER_ROW_GROUP * unit_bytes
        yield (file.path,), file.format, start, stop, compressed, block_bytes * is_stream
