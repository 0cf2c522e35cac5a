"""Text for the study: a domain to learn, and three kinds of general text that a model should not lose.

`facts` is near what is replayed (of the same kind, held out), `reference` is further (prose about a programming
language), and `fiction` is far: nothing like it is trained on in any setting.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from assets import WHEELS, unpacked_debian_package, wheel
from corpora import Document, general_documents, medical_documents, write_jsonl

from megatron_cpt.errors import DataError

PASSAGE_CHARACTERS = 800
# Every so manieth passage is measured: some 4,000 tokens of each kind, from beginning to end of a text.
REFERENCE_EVERY, FICTION_EVERY = 24, 240
AUSTEN = "r-cran-janeaustenr"  # Debian's package of the six novels, which are in the public domain; packaged under MIT


def write_texts(folder: Path, downloads: Path) -> None:
    """Write the four texts as jsonl, but for those that are there.

    Raises:
        CptError: a package cannot be had; the error says which and what to do.
    """
    makers: dict[str, Callable[[], Iterator[Document]]] = {
        "medical": lambda: medical_documents(wheel("medical", downloads), WHEELS["medical"].member),
        "facts": lambda: general_documents(wheel("general", downloads), WHEELS["general"].member),
        "reference": lambda: _passages(reference_documents(), REFERENCE_EVERY),
        "fiction": lambda: _passages(austen_novels(downloads), FICTION_EVERY),
    }
    for name, documents in makers.items():
        if not (folder / f"{name}.jsonl").exists():
            write_jsonl(documents(), folder / f"{name}.jsonl")


def reference_documents() -> Iterator[Document]:
    """The chapters of Python's language reference that the interpreter carries for help()."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def austen_novels(downloads: Path) -> Iterator[Document]:
    """Jane Austen's six novels, one document each, from Debian's package; fetched with apt-get, not installed.

    Raises:
        DataError: apt-get does not have the package.
    """
    for number, lines in enumerate(_r_texts(_austen_database(downloads))):
        yield f"austen-{number}", "\n".join(lines)


def _austen_database(downloads: Path) -> bytes:
    """The file in which R keeps the novels."""
    with tempfile.TemporaryDirectory(dir=downloads) as work:
        unpacked = unpacked_debian_package(AUSTEN, Path(work), "write .study/SIZE/texts/fiction.jsonl yourself")
        found = next(unpacked.rglob("Rdata.rdb"), None)
        if found is None:
            raise DataError(f"{AUSTEN} holds no Rdata.rdb", hint="its release has changed")
        return found.read_bytes()


def _r_texts(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R data base: zlib streams one after the other, each behind its length."""
    while database:
        stream = zlib.decompressobj()
        vector = stream.decompress(database[4:])
        database = stream.unused_data
        yield list(_strings(vector))


def _strings(vector: bytes) -> Iterator[str]:
    """The strings of one serialised character vector: R's XDR format 3, see "R Internals", section 1.8."""
    (name_bytes,) = struct.unpack_from(">i", vector, 14)  # behind "X\n", three versions: the name of the encoding
    position = 18 + name_bytes
    kind, count = struct.unpack_from(">ii", vector, position)
    if kind & 0xFF != 16:
        raise DataError(f"the data base of {AUSTEN} holds something else than text", hint="its release has changed")
    position += 8
    for _ in range(count):
        _flags, length_bytes = struct.unpack_from(">ii", vector, position)
        position += 8
        yield vector[position : position + length_bytes].decode()
        position += length_bytes


def _passages(documents: Iterable[Document], every: int) -> Iterator[Document]:
    """Pieces of some PASSAGE_CHARACTERS, cut between paragraphs: every so manieth of them."""
    pieces = ((f"{name}/{number}", piece) for name, text in documents for number, piece in enumerate(_pieces(text)))
    yield from (piece for number, piece in enumerate(pieces) if number % every == every // 2)


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph.strip("\n") + "\n\n"
        if len(piece) >= PASSAGE_CHARACTERS:
            yield piece.strip()
            piece = ""
