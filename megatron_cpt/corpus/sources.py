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

from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.errors import DataError

FileFormat = Literal["jsonl", "parquet", "text"]
FORMAT_OF_SUFFIX: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text",
}  # fmt: skip

MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_WANTED = 1 << 20, 16 << 20, 64


@dataclass(frozen=True)
class InputFile:
    path: str
    format: FileFormat
    size_bytes: int


@dataclass(frozen=True)
class Unit:
    """A part of one source. `start` and `stop`: byte range (jsonl), row groups (parquet), else the whole files."""

    index: int
    source: str
    format: FileFormat
    text_key: str
    paths: tuple[str, ...]  # several for small text files, else one
    start: int
    stop: int
    size_bytes: int  # input bytes, for progress


def find_files(source: Source) -> list[InputFile]:
    """The files of a source in a fixed order: as listed, a folder or a glob in sorted order."""
    found: list[InputFile] = []
    for pattern in source.files:
        matches = list(_expand(pattern, source))
        if not matches:
            raise DataError(
                f"source {source.name!r}: {pattern} matches no file",
                hint="paths are relative to the working directory; known names end in "
                + " ".join(sorted(FORMAT_OF_SUFFIX)),
            )
        found += matches
    return found


def _expand(pattern: str, source: Source) -> Iterator[InputFile]:
    path = Path(pattern)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        known = [p for p in inside if source.format != "auto" or p.suffix in FORMAT_OF_SUFFIX]
        yield from (_input_file(p, source) for p in known)
    elif path.is_file():
        yield _input_file(path, source)
    else:
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        for name in sorted(names):
            if Path(name).is_file():
                yield _input_file(Path(name), source)


def _input_file(path: Path, source: Source) -> InputFile:
    file_format = source.format if source.format != "auto" else FORMAT_OF_SUFFIX.get(path.suffix)
    if file_format is None:
        raise DataError(
            f"{path}: cannot tell its format from its name",
            hint=f"state format: for source {source.name!r}; known names end in {' '.join(sorted(FORMAT_OF_SUFFIX))}",
        )
    return InputFile(str(path), file_format, path.stat().st_size)


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
        for paths, file_format, start, stop, size in _cut(own, unit_bytes):
            units.append(Unit(len(units), source.name, file_format, source.text, paths, start, stop, size))
    return units


Cut = tuple[tuple[str, ...], FileFormat, int, int, int]


def _cut(files: list[InputFile], unit_bytes: int) -> Iterator[Cut]:
    """Units of one source: ranges of a large file, groups of small text files."""
    group: list[InputFile] = []
    for file in files:
        if file.format == "text":
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
    return tuple(file.path for file in files), "text", 0, len(files), size


def _ranges(file: InputFile, unit_bytes: int) -> Iterator[Cut]:
    if file.format == "jsonl":
        for start in range(0, file.size_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.size_bytes)
            yield (file.path,), file.format, start, stop, stop - start
        return
    from megatron_cpt.corpus.readers_columnar import row_group_ranges

    for start, stop, size in row_group_ranges(file.path, unit_bytes):
        yield (file.path,), file.format, start, stop, size
