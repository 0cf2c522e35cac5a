"""csv and tsv: every row is a document or a counted reject."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.errors import DataError
from tests.unit.corpus.readers.test_readers import read

_cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_cell, _cell), max_size=12), suffix=st.sampled_from(["csv", "tsv"]))
def test_what_a_spreadsheet_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter="," if suffix == "csv" else "\t")
        writer.writerows([("id", "text"), *rows])
    assert read(file)[0] == [text for _, text in rows]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.text(alphabet='ab,"\n', min_size=1, max_size=30), max_size=12))
def test_a_field_over_the_limit_is_one_reject_whatever_lines_it_has(tmp_path: Path, rows: list[str]) -> None:
    file = tmp_path / "a.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["text"], *([row] for row in rows)])
    texts, tally = read(file, limit=10)
    assert texts == [row for row in rows if len(row) <= 10]
    assert tally.counts["document_too_long"] == len(rows) - len(texts)


def test_bad_rows_are_rejects_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,"two\nlines"\r\n2,ok\r\n3\r\n\r\n4,caf\xe9\r\n5,"a"b\r\n6,last\r\n'
        + b"7,"
        + b"x" * 2000
    )
    texts, tally = read(file, limit=1000)
    assert texts == ["two\nlines", "ok", "last"]
    assert [(r.place, r.reason) for r in tally.rejects] == [
        (5, "invalid_csv"), (7, "invalid_utf8"), (8, "invalid_csv"), (10, "document_too_long"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", "has no column 'text'"),
        ("text,text\na,b\n", "two columns 'text'"),
        ('id,text\n1,"open\n2,swallowed\n3,swallowed\n', "row at line 2 never closes"),
        ('id,text\n1,ok\n2,"' + "line\n" * 2000 + '"\n', "row at line 3 has more than 4,000 characters"),
        ('"id,text\n1,ok\n', "its first row is not csv"),
        ("id;text\n1;ok\n", "no column 'text'\nhint: its columns stand apart by semicolons"),
        ("id\ttext\n1\tok\n", r"hint: .* by tabs: .*`format: tsv`"),
    ],
)
def test_files_that_cannot_be_read_are_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", limit=1000)
