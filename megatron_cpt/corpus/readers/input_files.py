"""The files of a source: folders and globs expanded in a fixed order, and the format of each by its name.

A folder, its name with `/*` and a glob that matches folders give the same files. What is passed over is counted and
named in one line; only a file that is named itself must have a known format.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.corpus.readers.compression import COMPRESSED_SUFFIXES
from megatron_cpt.corpus.readers.globs import matching_names
from megatron_cpt.corpus.readers.unit import FileFormat
from megatron_cpt.corpus.readers.unreadable import unreadable_file
from megatron_cpt.corpus.schema import Source
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)

_SUFFIXES: dict[FileFormat, str] = {
    "jsonl": ".jsonl .json .ndjson",
    "parquet": ".parquet",
    "arrow": ".arrow .feather",
    "csv": ".csv",
    "tsv": ".tsv .tab",
    "html": ".html .htm .xhtml",
    "text": ".txt .md .rst .tex .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx "
    ".go .rs .rb .php .cs .swift .m .r .jl .lua .pl .sh .bash .sql .css .yaml .yml .toml .cmake .f90 .hs .ml .v .vhd",
}
FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Small files that datasets.save_to_disk leaves beside its Arrow files.
_SAVE_TO_DISK_FILES = frozenset({"state.json", "dataset_info.json"})
_PACKED = (
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".tar.gz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".z",
    ".br",
    ".lzma",
    ".sz",
)
_KINDS_SHOWN, _NAMES_SHOWN = 6, 3


@dataclass(frozen=True)
class InputFile:
    path: str
    format: FileFormat
    size_bytes: int
    identity: tuple[int, int]  # equal for two names of one file


# Behind the prefix of a dataset: what is written beside .bin and .idx.
_OWN_OUTPUT = (
    ".manifest.json", ".documents.jsonl", ".rejects.jsonl", ".duplicates.jsonl", ".report.html", ".kl.json",
)  # fmt: skip


@dataclass
class _PassedOver:
    """Files that a folder or a glob has and that are not read, by kind."""

    kinds: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, path: str, kind: str) -> None:
        self.kinds[kind] += 1
        if len(self.names) < _NAMES_SHOWN:
            self.names.append(path)

    def say(self, source: str) -> None:
        total = self.kinds.total()
        if not total:
            return
        kinds = [f"{count:,} {kind}" for kind, count in self.kinds.most_common(_KINDS_SHOWN)]
        more = " ..." if total > len(self.names) else ""
        log.info(
            "source %r: %s file(s) passed over: %s (%s%s). To read files of other names, state format: for the source",
            source, f"{total:,}", ", ".join(kinds), ", ".join(self.names), more,
        )  # fmt: skip


def find_files(source: Source) -> list[InputFile]:
    """The files of a source in a fixed order: as listed, a folder or a glob in sorted order.

    Raises DataError for a pattern that matches nothing to read, and for a file that two patterns match.
    """
    found: dict[tuple[int, int], InputFile] = {}
    passed_over = _PassedOver()
    for pattern in source.files:
        try:
            matches = _expand(pattern, source, passed_over)
        except OSError as error:
            raise unreadable_file(pattern, error) from error
        if not matches:
            raise _no_match(pattern, source, passed_over)
        if twice := found.keys() & matches.keys():
            raise _named_twice(source, *((group[identity]) for identity in twice for group in (found, matches)))
        found |= matches
    passed_over.say(source.name)
    return list(found.values())


def _expand(pattern: str, source: Source, passed_over: _PassedOver) -> dict[tuple[int, int], InputFile]:
    """The files of one pattern by their identity, so that each is read once however many links lead to it."""
    if Path(pattern).is_file():
        file = _named_file(pattern, source)
        return {file.identity: file}
    if Path(pattern).is_dir():
        _refuse_several_splits(pattern)
        paths = _in_order(_walk(_normal(pattern), passed_over, set()))
    else:
        paths = _matches(pattern, passed_over)
    found: dict[tuple[int, int], InputFile] = {}
    own = set() if pattern.endswith(_OWN_OUTPUT) else _own_output(paths)
    for path in paths:
        if path in own or _is_of_unfinished_run(path):
            passed_over.add(path, "output of an earlier run")
            continue
        file_format = source.format if source.format != "auto" else _format_of(path)
        if file_format is None:
            passed_over.add(path, _kind(path))
            continue
        file = _input_file(path, file_format)
        if found.setdefault(file.identity, file) is not file:
            passed_over.add(path, "other name(s) of a file that is read")
    return found


def _own_output(paths: list[str]) -> set[str]:
    """Which of the files an earlier run wrote: those named after a dataset that lies beside them."""
    prefixes: set[str] = set()
    for path in paths:
        prefix = path.removesuffix(".manifest.json")
        if prefix != path and Path(f"{prefix}.idx").exists():  # other tools have files of that name too
            names = [place for place, letter in enumerate(prefix) if letter == "_"]  # PREFIX_train: of a split
            prefixes |= {prefix, *(prefix[:place] for place in names)}
    stems = ((path, suffix) for path in paths for suffix in _OWN_OUTPUT if path.endswith(suffix))
    return {path for path, suffix in stems if path.removesuffix(suffix) in prefixes}


def _is_of_unfinished_run(path: str) -> bool:
    folder = path.rpartition("/")[0]
    return folder.endswith(".partial") and Path(folder, "lock").exists()


def _matches(pattern: str, passed_over: _PassedOver) -> list[str]:
    """The files that a glob matches, and those in the folders that it matches."""
    names = matching_names(pattern)
    folders = [name for name in names if Path(name).is_dir()]
    files = [_normal(name) for name in names if Path(name).is_file()]
    if not folders:
        return files
    visited: set[str] = set()
    for folder in folders:
        _refuse_several_splits(folder)
    inside = [path for folder in folders for path in _walk(_normal(folder), passed_over, visited)]
    return _in_order(_each_once([*files, *inside]))


def _each_once(paths: list[str]) -> Iterator[str]:
    """One path per file: the shortest, where linked folders give it several."""
    real_folders: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for path in sorted(paths, key=lambda path: (path.count("/"), path)):
        folder, slash, name = path.rpartition("/")
        real = real_folders.get(folder) or real_folders.setdefault(folder, os.path.realpath(folder or slash or "."))
        if (real, name) not in seen:
            seen.add((real, name))
            yield path


def _walk(folder: str, passed_over: _PassedOver, visited: set[str]) -> Iterator[str]:
    """Files below a folder, of each folder once however many links lead to it; hidden ones are passed over."""
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # a folder before links to it
    for entry in ordered:
        path = f"{folder}/{entry.name}" if folder != "." else entry.name
        if entry.is_dir():
            if entry.name.startswith("."):
                passed_over.add(path, "hidden folder(s)")
            else:
                yield from _walk(path, passed_over, visited)
        elif not entry.is_file():
            passed_over.add(path, "broken link(s) or special file(s)")
        elif entry.name.startswith("."):
            passed_over.add(path, "hidden")
        elif entry.name not in _SAVE_TO_DISK_FILES:
            yield path


def _refuse_several_splits(folder: str) -> None:
    if (Path(folder) / "dataset_dict.json").is_file():
        splits = sorted(str(path) for path in Path(folder).iterdir() if path.is_dir())
        raise DataError(f"{folder} holds several splits", hint=f"name one: {', '.join(splits)}")


def _normal(path: str) -> str:
    """As pathlib writes it: without `./` before and `/` behind."""
    return str(Path(path))


def _in_order(paths: Iterator[str]) -> list[str]:
    return sorted(paths, key=lambda path: path.split("/"))


def _named_file(path: str, source: Source) -> InputFile:
    file_format = source.format if source.format != "auto" else _format_of(path)
    if file_format is None:
        if path.lower().endswith(_PACKED):
            what = f"{path}: this kind of archive or compression is not read"
            raise DataError(what, hint=f"unpack it, or compress it as one of {' '.join(COMPRESSED_SUFFIXES)}")
        raise DataError(
            f"{path}: cannot tell its format from its name",
            hint=f"state format: for source {source.name!r}; one of jsonl parquet arrow csv tsv text html",
        )
    return _input_file(_normal(path), file_format)


def _input_file(path: str, file_format: FileFormat) -> InputFile:
    stat = Path(path).stat()
    return InputFile(path, file_format, stat.st_size, (stat.st_dev, stat.st_ino))


def _format_of(path: str) -> FileFormat | None:
    """Format by the suffix, looking through a compression suffix; case does not count."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())  # noqa: PTH119, PTH122 (a Path each would be slow)
    if suffix in COMPRESSED_SUFFIXES:
        suffix = os.path.splitext(stem)[1]  # noqa: PTH122
    return FORMAT_OF_SUFFIX.get(suffix)


def _kind(path: str) -> str:
    suffixes = Path(path).suffixes
    return suffixes[-1].lower() if suffixes else "without a suffix"


def _no_match(pattern: str, source: Source, passed_over: _PassedOver) -> DataError:
    hint = (
        "paths are relative to the working directory; known names end in .jsonl .parquet .arrow .csv .tsv .txt .md "
        f".html and those of code, also with {' '.join(COMPRESSED_SUFFIXES)}"
    )
    if fault := _not_a_file(pattern):
        return DataError(f"source {source.name!r}: {pattern} {fault[0]}", hint=fault[1])
    if passed_over.kinds:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.kinds.most_common(_KINDS_SHOWN))
        hint = f"it has {kinds}; to read files whose name does not tell their format, state format:"
    elif glob.has_magic(pattern):
        for folder in Path(pattern).parents:
            if glob.has_magic(str(folder)) and folder.is_dir():
                rest = Path(pattern).relative_to(folder)
                hint = f"{folder} is a folder: escape the brackets in its name, {glob.escape(str(folder))}/{rest}"
                break
    return DataError(f"source {source.name!r}: {pattern} matches no file", hint=hint)


def _not_a_file(pattern: str) -> tuple[str, str] | None:
    """What else the name may mean, and what to do about it."""
    if Path(pattern).exists() and not Path(pattern).is_dir():
        return "is neither a file nor a folder", "give a file; to read jsonl from a pipe, take - for standard input"
    if Path(pattern).is_symlink():
        return f"is a link to {Path(pattern).readlink()}, which is not there", "repair the link"
    if "://" in pattern:
        return "is not on this machine", "copy it to a disk first"
    if pattern.startswith("~"):
        return "matches no file: ~ is not expanded here", f"write {Path(pattern).expanduser()}"
    if "{" in pattern:
        return "matches no file: braces are not expanded here", "list a pattern for each"
    return None


def _named_twice(source: Source, first: InputFile, second: InputFile, *_: InputFile) -> DataError:
    same = "" if first.path == second.path else f", the second time as {second.path}"
    return DataError(
        f"source {source.name!r} has {first.path} twice{same}",
        hint="name each file once; to see a source more often, give it a larger weight at training",
    )
