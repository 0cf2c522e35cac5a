"""Text files, source files and HTML pages: one document each."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.readers.compression import open_input
from megatron_cpt.corpus.readers.encoding import NotUtf8, decoded, is_binary
from megatron_cpt.corpus.readers.html_article import article_text
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.readers.unit import Unit


def read_whole_files(unit: Unit, tally: UnitTally, max_document_bytes: int) -> Iterator[Batch]:
    """One document per file. It has no keys, so whatever `metadata` asks for is null."""
    is_html = unit.format == "html"
    page_text = article_text if unit.main_content else html_to_text
    for path in unit.paths:
        tally.documents_read += 1
        with open_input(path) as file:
            data = file.read(max_document_bytes + 1)
        if len(data) > max_document_bytes:
            tally.reject(path, 1, "document_too_long", f"more than {max_document_bytes:,} bytes")
            continue
        try:
            text = decoded(data)
        except NotUtf8 as error:
            tally.reject(path, 1, "invalid_utf8", str(error))
            continue
        if is_binary(data):
            tally.reject(path, 1, "not_text", "many zero bytes or control characters, as in a binary file")
            continue
        metadata = [dict.fromkeys(unit.metadata)] if unit.metadata else None
        yield Batch(path, [page_text(text) if is_html else text], [1], metadata, from_pages=is_html)
