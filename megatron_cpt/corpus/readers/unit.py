"""A unit of work: a part of one source, the smallest thing that a worker takes and that a resumed run repeats.

A stream is a file that cannot be read from an arbitrary offset. It is planned as one unit and becomes one unit per
piece while it is read; see streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Literal

FileFormat = Literal["jsonl", "parquet", "arrow", "csv", "tsv", "text", "html"]


@dataclass(frozen=True)
class Unit:
    """Where a worker finds its documents.

    `start` and `stop` are a byte range (jsonl) or row groups (parquet) of the only file; with `stop` None the unit is
    the whole of its files.
    """

    number: int  # among the planned units, in output order
    source: str
    text_field: str
    metadata: tuple[str, ...]
    paths: tuple[str, ...]
    formats: tuple[FileFormat, ...]  # of each path
    start: int
    stop: int | None
    size_bytes: int  # input bytes, for progress
    main_content: bool = False  # of HTML pages, only what `article_text` finds
    piece_bytes: int = 0  # of a stream: decoded bytes of a piece, about
    piece: int | None = None  # of a piece: its number within the stream
    data: str = ""  # of a piece: the file that holds it, as lines or as an Arrow stream

    @property
    def format(self) -> FileFormat:
        """The format of a unit that has only one."""
        return self.formats[0]

    def by_format(self) -> Iterator[Unit]:
        """The unit itself, or its files in order as units of one format each."""
        if len(set(self.formats)) == 1:
            yield self
            return
        for one, files in groupby(zip(self.paths, self.formats, strict=True), key=itemgetter(1)):
            paths = tuple(path for path, _ in files)
            yield replace(self, paths=paths, formats=(one,) * len(paths))

    @property
    def name(self) -> str:
        """What its files in the staging folder are called by: `000012`, or `000012-0003` for piece 3 of stream 12."""
        return f"{self.number:06d}" if self.piece is None else f"{self.number:06d}-{self.piece:04d}"

    @property
    def is_stream(self) -> bool:
        return self.piece_bytes > 0

    def as_piece(self, number: int, size_bytes: int) -> Unit:
        """Piece `number` of this stream."""
        return replace(self, piece=number, size_bytes=size_bytes, piece_bytes=0)
