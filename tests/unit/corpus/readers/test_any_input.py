"""Any content of the formats that have their own framing: read whole, or one error; nothing lost, nothing made up."""

from __future__ import annotations

import bz2
import json
import lzma
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.documents import UnitTally
from megatron_cpt.corpus.readers.encoding import likely_encoding
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS
from tests.unit.corpus.readers.test_readers import read

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COMPRESS = {".bz2": bz2.compress, ".xz": lzma.compress}
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def streams(texts: list[str], cuts: list[int], suffix: str) -> bytes:
    """Lines of jsonl, compressed in streams that end anywhere, within a line and within a character too."""
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    ends = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join(COMPRESS[suffix](data[one:other]) for one, other in pairwise(ends))


@pytest.mark.parametrize("suffix", COMPRESS)
@FAST
@given(texts=st.lists(_text, min_size=1, max_size=12), cuts=st.lists(st.integers(0, 2000), max_size=4))
def test_streams_that_end_anywhere_are_one_file(tmp_path: Path, suffix: str, texts: list[str], cuts: list[int]) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(streams(texts, cuts, suffix))
    assert read(tmp_path / f"a.jsonl{suffix}")[0] == texts


@pytest.mark.parametrize("suffix", COMPRESS)
@FAST
@given(cuts=st.lists(st.integers(0, 2000), max_size=3), place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_in_any_stream_is_an_error_or_changes_nothing(
    tmp_path: Path, suffix: str, cuts: list[int], place: int, flip: int
) -> None:
    data = bytearray(streams(TEXTS, cuts, suffix))
    data[place % len(data)] ^= flip
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    try:
        texts, _ = read(tmp_path / f"a.jsonl{suffix}")
    except DataError as error:
        assert error.hint
    else:
        assert texts == TEXTS  # the padding of bits behind a stream of bz2


_layouts = st.sampled_from([pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])


@FAST
@given(
    texts=st.lists(st.one_of(_text, st.none()), max_size=12),
    kind=_layouts,
    rows=st.integers(1, 5),
    is_file=st.booleans(),
)
def test_an_arrow_file_of_any_batches_gives_every_row_or_rejects_it(
    tmp_path: Path, texts: list[str | None], kind: Any, rows: int, is_file: bool
) -> None:
    values: list[Any] = [text.encode() if text is not None and kind == pa.binary() else text for text in texts]
    table = pa.table({"n": pa.array(range(len(texts))), "text": pa.array(values, kind)})
    path = tmp_path / "a.arrow"
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    found, tally = read(path)
    assert found == [text for text in texts if text is not None]
    assert [reject.place for reject in tally.rejects] == [i for i, text in enumerate(texts, 1) if text is None]


@FAST
@given(place=st.integers(0, 10**6), flips=st.lists(st.integers(1, 255), min_size=1, max_size=8), is_file=st.booleans())
def test_changed_bytes_of_an_arrow_file_never_lose_a_row(
    tmp_path: Path, place: int, flips: list[int], is_file: bool
) -> None:
    """It has no checksums, so a changed letter cannot be seen; a changed length or offset can."""
    path, table = tmp_path / "a.arrow", pa.table({"text": TEXTS * 2})
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    data = bytearray(path.read_bytes())
    for offset, flip in enumerate(flips):
        data[(place + offset) % len(data)] ^= flip
    path.write_bytes(data)
    try:
        _, tally = read(path)
    except DataError as error:
        assert error.hint
    else:
        assert tally.documents_read >= 1


@FAST
@given(data=st.binary(max_size=200), suffix=st.sampled_from(["csv", "tsv"]))
def test_any_bytes_behind_the_first_row_of_a_table_are_documents_or_rejects(
    tmp_path: Path, data: bytes, suffix: str
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"text\n" + data)
    try:
        texts, tally = read(tmp_path / f"a.{suffix}", limit=150)  # asserts read = kept + rejected
    except DataError as error:
        assert "never closes" in error.message or "characters" in error.message
    else:
        assert isinstance(tally, UnitTally) and all(text.encode() for text in texts if text)


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4
BINARY = {
    "picture": PNG,
    "program": b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x03\0>\0" + b".text .data\n" * 40,
    "archive of texts": b"readme.txt" + b"\0" * 90 + b"0000644" + b"\0" * 200 + b"plain words\n" * 20,
    "control characters": bytes([1, 2, 3, 4, 5, 6, 7, 8]) * 4 + b"some words " * 20,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("kind", ["text", "html"])
def test_a_binary_file_is_no_text(tmp_path: Path, make_corpus: Any, name: str, kind: str) -> None:
    (tmp_path / "a.bin").write_bytes(BINARY[name])
    assert likely_encoding(BINARY[name]) is None
    with pytest.raises(DataError, match="1 of 1 documents") as caught:
        preprocess(make_corpus(tmp_path / "a.bin", source={"format": kind}), workers=1)
    assert "leave binary files out" in str(caught.value.hint) and "iconv" not in str(caught.value)
    assert not list((tmp_path / "out").glob("set.[bi]*"))


@pytest.mark.parametrize(
    "text",
    [
        "tab\tand form feed\f",
        "\x1b[1mcoloured\x1b[0m log",
        "Straße",
        "\ufefftext",
        "",
        "N\x08NA\x08AM\x08ME\x08E of a manual",
    ],
)
def test_text_with_the_control_characters_of_text_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text or "x", encoding="utf-8")
    assert read(tmp_path / "a.txt")[0] == [(text or "x").removeprefix("\ufeff")]
