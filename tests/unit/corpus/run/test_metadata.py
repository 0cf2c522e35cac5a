"""Kept keys: every document of a dataset has its line, the product's own fields stand, absent keys are named."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.dataset.manifest import read_manifest
from megatron_cpt.corpus.run.preprocess import dataset_prefixes, preprocess
from megatron_cpt.errors import ConfigError, DataError
from tests.unit.corpus.conftest import write_jsonl


def write_records(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def listed(prefix: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{prefix}.documents.jsonl").read_text().splitlines()]


def test_a_dotted_key_is_a_path_and_removes_duplicates_by_it(tmp_path: Path, make_corpus: Any) -> None:
    file = write_records(
        tmp_path / "a.jsonl",
        {"text": "one", "meta": {"id": "b"}},
        {"text": "two other words", "meta": {"id": "b"}},
        {"text": "three", "meta": {"id": "c"}, "meta.id": "flat"},
    )
    corpus = make_corpus(file, source={"metadata": ["meta.id"]}, dedup={"exact": False, "id_key": "meta.id"})
    outcome = preprocess(corpus, workers=1)
    assert outcome.rejects == {"duplicate_id": 1}
    assert [(row["line"], row["meta.id"]) for row in listed(corpus.output_prefix)] == [(1, "b"), (3, "flat")]


def test_own_fields_are_not_overwritten_and_every_document_has_a_line(tmp_path: Path, make_corpus: Any) -> None:
    records = [{"text": f"first {i}", "line": "seven", "source": "web", "document": 9, "id": i} for i in range(20)]
    sources = [
        {"name": "a", "files": str(write_records(tmp_path / "a.jsonl", *records)),
         "metadata": ["id", "line", "source", "document"]},
        {"name": "b", "files": str(write_jsonl(tmp_path / "b.jsonl", [f"second {i}" for i in range(20)]))},
    ]  # fmt: skip
    corpus = make_corpus(sources=sources, split={"train": 0.5, "valid": 0.5})
    outcome = preprocess(corpus, workers=2)
    seen = []
    for prefix in dataset_prefixes(corpus).values():
        rows = listed(prefix)
        assert [row["document"] for row in rows] == list(range(outcome.datasets[prefix].document_count))
        seen += [(row["source"], row["line"]) for row in rows]
        first = next(row for row in rows if row["source"] == "a")
        assert first["metadata.line"] == "seven" and first["metadata.source"] == "web" and first["id"] in range(20)
    assert sorted(seen) == [(name, line) for name in "ab" for line in range(1, 21)]


def test_a_key_that_no_document_has_is_named(
    tmp_path: Path, make_corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_records(tmp_path / "a.jsonl", {"text": "one", "id": None}, {"text": "two"})
    with caplog.at_level(logging.WARNING):
        preprocess(make_corpus(file, source={"metadata": ["id", "url"]}), workers=1)
    assert "no document has the metadata key 'url'" in caplog.text and "'id'" not in caplog.text
    corpus = make_corpus(file, source={"metadata": ["url"]}, dedup={"exact": False, "id_key": "url"})
    with pytest.raises(DataError, match="no document has the key 'url'"):
        preprocess(corpus, workers=1, overwrite=True)


def test_a_file_whose_name_is_not_utf8_is_read_and_named(tmp_path: Path, make_corpus: Any) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    write_records(file, {"text": "one", "id": 1}, {"no": 2})
    corpus = make_corpus(file, source={"metadata": ["id"]}, max_reject_ratio=0.5)
    preprocess(corpus, workers=1)
    (row,) = listed(corpus.output_prefix)
    (reject,) = map(json.loads, Path(f"{corpus.output_prefix}.rejects.jsonl").read_text().splitlines())
    assert row["file"] == reject["file"] == f"{tmp_path}/\\udcff.jsonl"
    assert read_manifest(corpus.output_prefix).config["sources"][0]["files"] == [row["file"]]
    assert "\\udcff.jsonl" in Path(f"{corpus.output_prefix}.report.html").read_text()
    assert preprocess(corpus, workers=1).already_done


def test_integers_of_any_length_stay_what_they_are(tmp_path: Path, make_corpus: Any) -> None:
    """A float of 64 bits would make one id of two, and one of the documents a duplicate."""
    ids = [(1 << 64) + i for i in range(3)] + [-(1 << 63) - 1, 7, [1 << 70]]
    file = write_records(tmp_path / "a.jsonl", *({"text": f"document {i}", "id": i} for i in ids))
    with file.open("a") as out:
        out.write('{"text": "of many digits", "id": ' + "9" * 5000 + "}\n")
    corpus = make_corpus(file, source={"metadata": ["id"]}, dedup={"exact": False, "id_key": "id"})
    assert preprocess(corpus, workers=1).rejects == {}
    *kept, longest = [row["id"] for row in listed(corpus.output_prefix)]
    assert kept == [*map(str, ids[:4]), 7, [str(1 << 70)]]
    assert longest == "9" * 5000


def test_names_on_the_way_may_have_dots_themselves(tmp_path: Path, make_corpus: Any) -> None:
    records: list[dict[str, Any]] = [
        {"meta": {"a.b": 1}}, {"meta.a": {"b": 2}}, {"meta": {"a": {"b": 3}}}, {"meta": {"a": 0}, "meta.a": {"b": 4}},
        {"meta": {"a": {"c": 0}}}, {"meta": [{"a": 0}]}, {"meta": "a.b"}, {"meta": None},
    ]  # fmt: skip
    file = write_records(tmp_path / "a.jsonl", *({"text": f"t{i}"} | record for i, record in enumerate(records)))
    corpus = make_corpus(file, source={"metadata": ["meta.a.b"]})
    preprocess(corpus, workers=1)
    assert [row["meta.a.b"] for row in listed(corpus.output_prefix)] == [1, 2, 3, 4, None, None, None, None]


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused(key: str, make_corpus: Any) -> None:
    with pytest.raises(ConfigError, match="has an empty key"):
        make_corpus(Path("a.jsonl"), source={"metadata": ["id", key]})


@pytest.mark.parametrize("keys", [["id", "id"], ["line", "metadata.line"], ["line", "line"]])
def test_two_kept_keys_of_one_name_are_refused(keys: list[str], make_corpus: Any) -> None:
    with pytest.raises(ConfigError, match=r"would have one name in PREFIX\.documents\.jsonl"):
        make_corpus(Path("a.jsonl"), source={"metadata": keys})
