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
    }
    pq.write_table(pa.table({"text": ["hello world"], **columns}), tmp_path / "a.parquet")
    corpus = make_corpus(tmp_path / "a.parquet", source={"metadata": list(columns)})
    preprocess(corpus, workers=1)
    (row,) = map(json.loads, Path(f"{corpus.output_prefix}.documents.jsonl").read_text().splitlines())
    nanoseconds = row.pop("nanoseconds")
    assert nanoseconds.startswith("1970-01-01") and nanoseconds.endswith("000000001")
    assert row == {
        "document": 0, "source": "corpus", "file": str(tmp_path / "a.parquet"), "line": 1, "decimal": "1.50",
        "bytes": "AP8=", "word": "abc", "duration": "PT86400.5S", "date": "2024-02-29", "time": "01:02:03",
        "moment": moment.isoformat(), "nan": None, "large": (1 << 64) - 1, "nested": {"list": ["0.1", None]},
        "map": [["k", 1]], "dictionary": "x", "metadata.line": "seven", "nothing": None,
    }  # fmt: skip
