"""Names that a glob matches: those of glob.glob, but links lead round no circle and an unreadable folder is an error.

glob.glob leaves out a folder that it may not read, and follows a link to a folder above it 40 times over; with two
such links it does not come to an end.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def matching_names(pattern: str) -> list[str]:
    """The files and folders that `pattern` matches, sorted. Hidden ones only where the pattern names their dot.

    Raises OSError for a folder that cannot be read.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    return sorted(set(_below(path.anchor or ".", parts, frozenset()))) if parts else [path.anchor]


def _below(folder: str, parts: tuple[str, ...], above: frozenset[str]) -> Iterator[str]:
    """What matches `parts` below a folder; `above` has the real folders that lead to it, which no link may lead to."""
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        path = _join(folder, part)
        if rest and Path(path).is_dir():
            yield from _below(path, rest, above)
        elif not rest and os.path.lexists(path):
            yield path
        return
    if part == "**":
        if rest:
            yield from _below(folder, rest, above)
        above = above | {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = _join(folder, entry.name)
        if part == "**":
            if entry.name.startswith("."):
                continue
            if not rest:
                yield path
            if entry.is_dir() and os.path.realpath(path) not in above:
                yield from _below(path, parts, above)
        elif _matches(entry.name, part):
            if not rest:
                yield path
            elif entry.is_dir():
                yield from _below(path, rest, above)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder.rstrip('/')}/{name}"


def _matches(name: str, part: str) -> bool:
    return fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))
