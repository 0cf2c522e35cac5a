"""From a corpus description to units of work: files found, large ones cut into ranges, small ones joined in groups.

The list of units depends only on the input, never on the number of workers or shards, which is why the output does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_cpt.corpus.readers.compression import is_compressed
from megatron_cpt.corpus.readers.input_files import InputFile, find_files
from megatron_cpt.corpus.readers.unit import FileFormat, Unit
from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)

MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS_WANTED = 1 << 20, 16 << 20, 64
# A file that cannot be read from an arbitrary offset is cut into pieces while it is read; see streams.
MIN_PIECE_BYTES = 4 << 20
READ_BY_ONE_WORKER = frozenset({"text", "html", "csv", "tsv"})
# A row group of Parquet is left whole up to this many units.
UNITS_PER_ROW_GROUP = 4


def plan_units(corpus: Corpus) -> list[Unit]:
    """All units of the corpus in output order. Raises DataError when there is nothing to read."""
    found = [(source, find_files(source)) for source in corpus.sources]
    _say_what_two_sources_read(found)
    total_bytes = sum(file.size_bytes for _, files in found for file in files)
    if total_bytes == 0:
        count = sum(len(files) for _, files in found)
        raise DataError(f"the corpus is empty: {count} file(s), 0 bytes", hint="check the input files")
    unit_bytes = min(max(total_bytes // UNITS_WANTED, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    for source, files in found:
        main_content = (source.clean or corpus.clean).html == "article"
        for cut in _cut(files, unit_bytes):
            place = (cut.paths, cut.formats, cut.start, cut.stop, cut.size_bytes, main_content, cut.piece_bytes)
            units.append(Unit(len(units), source.name, source.text, source.metadata, *place))
    return units


def _say_what_two_sources_read(found: Sequence[tuple[Source, Sequence[InputFile]]]) -> None:
    """It may be meant, with another key as the text; mostly it is not."""
    owners: dict[tuple[int, int], str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for source, files in found:
        for file in files:
            owner = owners.setdefault(file.identity, source.name)
            if owner != source.name:
                shared.setdefault((owner, source.name), []).append(file.path)
    for (one, other), paths in shared.items():
        log.warning("sources %r and %r both read %s file(s), such as %s", one, other, f"{len(paths):,}", paths[0])


@dataclass(frozen=True)
class _Cut:
    """A unit before it has a number; the fields are Unit's."""

    paths: tuple[str, ...]
    formats: tuple[FileFormat, ...]
    start: int
    stop: int | None
    size_bytes: int
    piece_bytes: int = 0


def _cut(files: list[InputFile], unit_bytes: int) -> Iterator[_Cut]:
    """Units of one source: ranges of a large file, groups of small files."""
    group: list[InputFile] = []
    held_bytes = 0
    for file in files:
        is_whole = file.size_bytes <= unit_bytes or file.format in READ_BY_ONE_WORKER
        if not is_whole:
            if group:
                yield _group(group, held_bytes)
                group, held_bytes = [], 0
            yield from _ranges(file, unit_bytes)
            continue
        group.append(file)
        held_bytes += file.size_bytes
        if held_bytes >= unit_bytes:
            yield _group(group, held_bytes)
            group, held_bytes = [], 0
    if group:
        yield _group(group, held_bytes)


def _group(files: list[InputFile], size_bytes: int) -> _Cut:
    return _Cut(tuple(file.path for file in files), tuple(file.format for file in files), 0, None, size_bytes)


def _ranges(file: InputFile, unit_bytes: int) -> Iterator[_Cut]:
    """The units of a file larger than a unit."""
    piece_bytes = max(unit_bytes, MIN_PIECE_BYTES)
    if file.format == "arrow" or is_compressed(file.path):
        yield _Cut((file.path,), (file.format,), 0, None, file.size_bytes, piece_bytes)
        return
    if file.format == "jsonl":
        for start in range(0, file.size_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.size_bytes)
            yield _Cut((file.path,), (file.format,), start, stop, stop - start)
        return
    from megatron_cpt.corpus.readers.columnar import row_group_ranges

    for start, stop, compressed, uncompressed in row_group_ranges(file.path, unit_bytes):
        is_stream = stop == start + 1 and uncompressed > UNITS_PER_ROW_GROUP * unit_bytes
        yield _Cut((file.path,), (file.format,), start, stop, compressed, piece_bytes * is_stream)
