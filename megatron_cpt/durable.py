"""Files that appear whole or not at all, and outlive a loss of power."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_cpt.errors import UserError


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is whole and on the disk, so that a loss of power cannot empty it.

    Until then it is named by process: a worker that outlives its killed parent must not touch the next run's file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        yield file
        flush_to_disk(file)
    partial.replace(path)


def flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to disk, then rename: no reader ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        flush_to_disk(file)
    partial.replace(path)
    sync(path.parent)


def write_output(path: Path, data: bytes, hint: str) -> None:
    """Write a file that the user named, with the folders above it.

    Raises:
        UserError: it cannot be written; `hint` says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", hint=hint) from error


def sync(path: Path) -> None:
    """Flush a file to disk, or the names and renames inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
