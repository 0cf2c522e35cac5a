"""Parquet and Arrow: text in any layout of a column, damage that a checksum knows, metadata of any type."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.corpus.readers.columnar import row_group_ranges
from megatron_cpt.corpus.readers.parquet_footer import RowGroup, row_groups
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.errors import DataError
from tests.unit.corpus.readers.test_readers import read

WORDS = ["one", "two", "one", None, "Ünï"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_is_read_from_columns_of_any_layout(tmp_path: Path, kind: Any, suffix: str) -> None:
    values = [w.encode() if w and "binary" in str(kind) else w for w in WORDS]
    column = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values)
    table = pa.table({"text": column.cast(kind)})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    texts, tally = read(file)
    assert texts == ["one", "two", "one", "Ünï"]
    assert tally.counts == {"text_not_a_string": 1} and tally.rejects[0].place == 4


def test_bytes_that_are_not_utf8_are_rejects(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"ok", "stra\u00dfe".encode("latin-1")])}), tmp_path / "a.parquet")
    texts, tally = read(tmp_path / "a.parquet")
    assert texts == ["ok"] and tally.counts == {"invalid_utf8": 1}
    assert "looks like WINDOWS-1252" in tally.rejects[0].detail


def test_a_column_of_nulls_is_all_rejects(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1].counts == {"text_not_a_string": 3}


def test_a_dot_in_a_column_name_and_a_path_into_a_struct_both_work(tmp_path: Path) -> None:
    table = pa.table({"meta.body": ["flat"], "doc": [{"body": "deep", "n": 1}]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text="meta.body")[0] == ["flat"]
    assert read(tmp_path / "a.parquet", text="doc.body")[0] == ["deep"]
    assert read(tmp_path / "a.parquet", text="{meta.body}, {doc.body}")[0] == ["flat, deep"]


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_a_file_without_rows_has_no_documents(tmp_path: Path, kind: Any) -> None:
    empty = pa.table({"text": pa.array([], kind)})
    pq.write_table(empty, tmp_path / "a.parquet")
    pq.ParquetWriter(tmp_path / "b.parquet", empty.schema).close()
    (tmp_path / "c.arrow").write_bytes(arrow(empty, pa.ipc.new_file))
    (tmp_path / "d.arrow").write_bytes(arrow(empty, pa.ipc.new_stream))
    assert read(tmp_path)[1].documents_read == 0


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"]), pa.array(["d"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "x", "x", "y"]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", metadata=["y"])[0] == ["a"]
    with pytest.raises(DataError, match="two columns 'x'"):
        read(tmp_path / "a.parquet", text="x")


def test_a_flipped_byte_in_a_page_with_a_checksum_is_an_error(tmp_path: Path) -> None:
    texts = [f"the dose is {i} mg" for i in range(70, 80)]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data.replace(b"is 77 mg", b"is 97 mg", 1))
    assert read(tmp_path / "a.parquet")[0] == texts
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "b.parquet")


TABLE = pa.table({"text": [f"document {i:03d}" for i in range(60)]})
OTHER = pa.table({"text": [f"of another {i:01d}" for i in range(10)] * 6})


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(table: pa.Table, open_writer: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return sink.getvalue().to_pybytes()


def texts_or_none(file: Path, data: bytes) -> list[str] | None:
    """The texts of a file of these bytes, None when it is refused."""
    file.write_bytes(data)
    try:
        return read(file)[0]
    except DataError as error:
        assert error.hint
        return None


@pytest.mark.parametrize("open_writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_cut_anywhere_is_an_error(tmp_path: Path, open_writer: Any) -> None:
    """A stream that is cut between two record batches is a shorter stream to the library."""
    data = arrow(TABLE, open_writer)
    assert texts_or_none(tmp_path / "a.arrow", data) == TABLE["text"].to_pylist()
    for size in range(len(data)):
        assert texts_or_none(tmp_path / "a.arrow", data[:size]) is None, size


@pytest.mark.parametrize("write", [lambda t: arrow(t, pa.ipc.new_stream), lambda t: arrow(t, pa.ipc.new_file), parquet])
def test_files_joined_into_one_are_an_error(tmp_path: Path, write: Any) -> None:
    """A library reads one of them: an Arrow stream ends at its first end mark, a footer speaks of the last file."""
    file = tmp_path / ("a.parquet" if write is parquet else "a.arrow")
    for one, other in ((TABLE, TABLE), (TABLE, OTHER), (OTHER, TABLE)):
        assert texts_or_none(file, write(one) + write(other)) is None
    assert texts_or_none(file, write(TABLE) + b"\0" * 8) is None
    assert texts_or_none(file, b"\0" * 8 + write(TABLE)) is None


def test_a_feather_file_of_version_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + b"\0" * 60)
    with pytest.raises(DataError, match="Feather file of version 1"):
        read(tmp_path / "a.feather")


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x80])
def test_damage_in_a_parquet_file_with_checksums_never_changes_or_loses_a_document(tmp_path: Path, flip: int) -> None:
    """Also in its footer, which has no checksum. pyarrow ends the process at some of these when asked for a size."""
    table = pa.table({"text": TABLE["text"], "n": list(range(60))})
    data = parquet(table, write_page_checksum=True, row_group_size=20, data_page_size=100)
    assert texts_or_none(tmp_path / "a.parquet", data) == TABLE["text"].to_pylist()
    refused = 0
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= flip
        texts = texts_or_none(tmp_path / "a.parquet", bytes(damaged))
        assert texts in (None, TABLE["text"].to_pylist()), place
        refused += texts is None
        try:
            list(row_group_ranges(str(tmp_path / "a.parquet"), 100))
        except DataError as error:
            assert error.hint
    assert refused > 100


@pytest.mark.parametrize("size", [1, 7, 300])
def test_row_groups_of_a_footer_are_those_of_pyarrow(tmp_path: Path, size: int) -> None:
    columns = {f"c{i}": [f"text {i} {j}" * (j % 7) for j in range(300)] for i in range(20)}
    pq.write_table(
        pa.table(columns | {"nested": [[{"a": 1, "b": None}]] * 300}), tmp_path / "a.parquet", row_group_size=size
    )
    theirs = pq.ParquetFile(tmp_path / "a.parquet").metadata
    groups = [theirs.row_group(i) for i in range(theirs.num_row_groups)]
    assert list(row_groups(str(tmp_path / "a.parquet"))) == [
        RowGroup(g.num_rows, sum(g.column(i).total_compressed_size for i in range(g.num_columns)), g.total_byte_size)
        for g in groups
    ]


def test_metadata_of_any_type_becomes_json(tmp_path: Path, make_corpus: Any) -> None:
    moment = datetime.datetime(2024, 2, 29, 1, 2, 3)
    columns = {
        "decimal": pa.array([Decimal("1.50")]),
        "bytes": pa.array([b"\x00\xff"]),
        "word": pa.array([b"abc"]),
        "duration": pa.array([datetime.timedelta(days=1, milliseconds=500)]),
        "date": pa.array([datetime.date(2024, 2, 29)]),
        "time": pa.array([datetime.time(1, 2, 3)]),
        "moment": pa.array([moment]),
        "nanoseconds": pa.array([1], pa.timestamp("ns")),
        "nan": pa.array([float("nan")]),
        "large": pa.array([(1 << 64) - 1], pa.uint64()),
        "nested": pa.array([{"list": [Decimal("0.1"), None]}]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "dictionary": pa.array(["x"]).dictionary_encode(),
        "line": pa.array(["seven"]),
        "nothing": pa.nulls(1),
        "far": pa.array([1 << 60], pa.timestamp("s")),
        "nested far": pa.array([{"list": [1 << 60]}], pa.struct({"list": pa.list_(pa.timestamp("s"))})),
        "nowhere": pa.array([0], pa.timestamp("s", "Nowhere/Land")),
        "half": pa.array([1.5], pa.float16()),
        "interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        "runs": pa.RunEndEncodedArray.from_arrays([1], ["x"]),
        "uuid": pa.array([b"0123456789abcdef"], pa.binary(16)).cast(pa.uuid()),
    }
    table = pa.table({"text": ["hello world"], **columns})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    corpus = make_corpus(tmp_path / "a.arrow", source={"metadata": list(columns)})
    preprocess(corpus, workers=1)
    (row,) = map(json.loads, Path(f"{corpus.output_prefix}.documents.jsonl").read_text().splitlines())
    nanoseconds = row.pop("nanoseconds")
    assert nanoseconds.startswith("1970-01-01") and nanoseconds.endswith("000000001")
    assert row == {
        "document": 0, "source": "corpus", "file": str(tmp_path / "a.arrow"), "line": 1, "decimal": "1.50",
        "bytes": "AP8=", "word": "abc", "duration": "PT86400.5S", "date": "2024-02-29", "time": "01:02:03",
        "moment": moment.isoformat(), "nan": None, "large": (1 << 64) - 1, "nested": {"list": ["0.1", None]},
        "map": [["k", 1]], "dictionary": "x", "metadata.line": "seven", "nothing": None,
        "far": f"<value out of range: {1 << 60}>", "nested far": {"list": [f"<value out of range: {1 << 60}>"]},
        "nowhere": "0 (timestamp[s, tz=Nowhere/Land])", "half": 1.5, "interval": [1, 2, 3], "runs": "x",
        "uuid": "30313233-3435-3637-3839-616263646566",
    }  # fmt: skip
