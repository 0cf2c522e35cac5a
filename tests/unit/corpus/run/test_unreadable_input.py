"""Input that cannot be read: found before the start where it can be, judged per source, with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.corpus.readers import plan
from megatron_cpt.corpus.run import map_stage
from megatron_cpt.corpus.run import unit as unit_stage
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import write_jsonl


def test_nan_and_infinity_beside_a_whole_text_are_accepted_and_counted(tmp_path: Path, make_corpus: Any) -> None:
    lines = ['{"text":"a","score":NaN}', '{"text":"b","n":[-Infinity]}', '{"text":"c","n":1e999}', '{"text":"d"}']
    lines += ['{"text":"e","author":"\\ud83d"}', '{"text":NaN}', '{"text":"\\ud83d"}', '{"text":"f" NaN}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for keys in ({}, {"source": {"metadata": ["score", "n", "author"]}}):
        outcome = preprocess(make_corpus(tmp_path / "a.jsonl", max_reject_ratio=0.5, **keys), workers=1, overwrite=True)
        assert outcome.rejects == {"lone_surrogate": 1, "invalid_json": 2}
        assert next(iter(outcome.datasets.values())).document_count == 5
        assert outcome.notes["nonstandard_json"] >= 4


def test_one_unreadable_source_among_many_is_found_before_the_start(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [f"document {i}" for i in range(5000)])
    bad = write_jsonl(tmp_path / "bad.jsonl", ["content"] * 3, key="content")
    sources = [{"name": name, "files": str(file)} for name, file in (("good", good), ("bad", bad))]
    monkeypatch.setattr(unit_stage, "commit_unit", lambda *_: pytest.fail("work was done before the probe"))
    with pytest.raises(
        DataError, match=r"3 of 3 documents at the start of source 'bad'(.|\n)*bad.jsonl:1: missing_key"
    ):
        preprocess(make_corpus(sources=sources, max_reject_ratio=0.01), workers=1)


def test_what_the_sums_over_all_sources_hide_is_said_of_each(
    tmp_path: Path, make_corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps({"text": f"document {i}"}) for i in range(2000)]
    content = {
        "good": good,
        "half": [line for i in range(40) for line in (good[i], '{"body": "no text"}')],
        "blank": ["", " "],
        "empty": [],
        "without_text": ['{"text": ""}'] * 30,
    }
    sources = []
    for name, lines in content.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        sources.append({"name": name, "files": str(tmp_path / f"{name}.jsonl")})
    preprocess(make_corpus(sources=sources, max_reject_ratio=0.05), workers=1)
    said = [record.getMessage() for record in caplog.records if "source '" in record.getMessage()]
    assert [line.split("'")[1] for line in said] == ["half", "blank", "empty", "without_text"]
    assert "40 of its 80 documents cannot be read (40 missing_key)" in said[0]
    assert "gives nothing: 0 documents read" in said[1] and "gives nothing: 30 documents read" in said[3]


def test_json_over_several_lines_is_told_how_to_become_jsonl(tmp_path: Path, make_corpus: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}, indent=1) + "\n")
    with pytest.raises(DataError) as caught:
        preprocess(make_corpus(tmp_path / "a.jsonl"), workers=1)
    assert "jq -c . FILE" in str(caught.value.hint)


def test_a_source_that_turns_unreadable_later_stops_the_run_early(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 2_000)
    monkeypatch.setattr(map_stage, "EARLY_CHECK_DOCUMENTS", 300)
    good = write_jsonl(tmp_path / "good.jsonl", [f"document {i}" for i in range(2000)])
    rows = [{"text": "fine"}] * 110 + [{"body": "no text"}] * 2000
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"name": n, "files": str(f)} for n, f in (("bad", tmp_path / "bad.jsonl"), ("good", good))]
    done: list[str] = []
    original = unit_stage.commit_unit

    def counting(folder: Path, record: Any, tally: Any) -> None:
        done.append(record.source)
        original(folder, record, tally)

    monkeypatch.setattr(unit_stage, "commit_unit", counting)
    with pytest.raises(DataError, match=r"of source 'bad' cannot be read(.|\n)*bad.jsonl:111: missing_key"):
        preprocess(make_corpus(sources=sources), workers=1)
    assert "good" not in done


ENCODINGS = [
    ("utf-16", "UTF-16LE"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32-le", "UTF-32LE"),
    ("utf-32-be", "UTF-32BE"), ("cp1252", "WINDOWS-1252"), ("latin-1", "WINDOWS-1252"),
]  # fmt: skip
GERMAN = "Größere Mengen sind für Ärzte üblich; so heißt es"
ASCII = "plain words only whose UTF-16 is also valid UTF-8"


@pytest.mark.parametrize(("encoding", "name"), ENCODINGS)
@pytest.mark.parametrize("suffix", ["txt", "html", "jsonl", "csv", "tsv", "parquet"])
def test_other_encodings_are_named_with_the_command_that_converts_them(
    tmp_path: Path, make_corpus: Any, encoding: str, name: str, suffix: str
) -> None:
    for text in (GERMAN, ASCII):
        if text == ASCII and name == "WINDOWS-1252":
            continue  # that is UTF-8
        line = {
            "jsonl": json.dumps({"text": text}, ensure_ascii=False),
            "csv": f"text\n{text}\n",
            "tsv": f"text\n{text}",
        }
        data = line.get(suffix, text).encode(encoding)
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [data]}), tmp_path / "a.parquet")
        else:
            (tmp_path / f"a.{suffix}").write_bytes(data)
        with pytest.raises(DataError) as caught:
            preprocess(make_corpus(tmp_path / f"a.{suffix}"), workers=1)
        assert f"iconv -f {name} -t UTF-8" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_key_without_text_is_told_to_be_another(tmp_path: Path, make_corpus: Any, kind: str) -> None:
    """A key that holds numbers, or a column of nothing but nulls."""
    rows = [{"text": None if kind == "parquet" else 5, "body": "what is meant"}] * 3
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="3 text_not_a_string") as caught:
        preprocess(make_corpus(tmp_path / f"a.{kind}"), workers=1)
    assert "--json-key KEY" in str(caught.value.hint)


def test_another_script_in_utf8_is_not_taken_for_another_encoding(tmp_path: Path, make_corpus: Any) -> None:
    (tmp_path / "a.txt").write_bytes("第一条 为了保护当事人的合法权益，制定本法。".encode("gb18030"))
    with pytest.raises(DataError) as caught:
        preprocess(make_corpus(tmp_path / "a.txt"), workers=1)
    assert "iconv -f ENCODING" in str(caught.value.hint)
    assert "looks like" not in caught.value.message
