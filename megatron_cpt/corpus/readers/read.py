"""A unit in, batches of documents out: one reader per format.

A reader never drops a document silently: what it cannot read it gives to the tally with place and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.jsonl import read_jsonl
from megatron_cpt.corpus.readers.tabular import read_tabular
from megatron_cpt.corpus.readers.unit import FileFormat, Unit
from megatron_cpt.corpus.readers.whole_files import read_whole_files

Reader = Callable[[Unit, UnitTally, int], Iterator[Batch]]


def _read_columnar(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    from megatron_cpt.corpus.readers.columnar import read_columnar  # pyarrow takes a while to import

    return read_columnar(unit, tally, max_document_bytes)


READERS: dict[FileFormat, Reader] = {
    "jsonl": read_jsonl,
    "parquet": _read_columnar,
    "arrow": _read_columnar,
    "csv": read_tabular,
    "tsv": read_tabular,
    "text": read_whole_files,
    "html": read_whole_files,
}


def read_unit(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    """Documents of a unit in order; `tally.documents_read` counts every document met, readable or not."""
    for part in unit.by_format():
        yield from READERS[part.format](part, tally, max_document_bytes)
