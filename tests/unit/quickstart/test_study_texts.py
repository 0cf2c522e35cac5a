"""The texts of the study of forgetting: R's data bases, and passages of equal distance."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "forgetting_study"))
import texts

from megatron_cpt.errors import DataError


def _vector(lines: list[str], kind: int = 16) -> bytes:
    """A character vector as R serialises it: its format 3, big-endian."""
    head = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    strings = b"".join(struct.pack(">ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
    return head + struct.pack(">ii", kind, len(lines)) + strings


def _database(*vectors: bytes) -> bytes:
    return b"".join(struct.pack(">i", len(vector)) + zlib.compress(vector) for vector in vectors)


def test_all_texts_of_a_data_base_are_read_to_their_last_line() -> None:
    first, second = ["EMMA", "", "Chapter I – “Emma”"], ["Persuasion"]
    assert list(texts._r_texts(_database(_vector(first), _vector(second)))) == [first, second]


def test_a_data_base_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="something else than text"):
        list(texts._r_texts(_database(_vector(["1"], kind=13))))


def test_passages_are_whole_paragraphs_from_beginning_to_end() -> None:
    paragraphs = [f"{number} " + "word " * 100 for number in range(40)]
    passages = list(texts._passages([("book", "\n\n".join(paragraphs))], every=4))
    assert [name for name, _ in passages] == [f"book/{number}" for number in range(2, 20, 4)]
    for _, text in passages:
        assert all(part.strip() in {one.strip() for one in paragraphs} for part in text.split("\n\n"))
