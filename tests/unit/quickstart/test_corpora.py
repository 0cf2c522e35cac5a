"""Text extraction and the document-level split of the quickstart."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import corpora
import pytest

from megatron_cpt.errors import DataError

OBO = r"""format-version: 1.2

[Term]
id: HP:0000001
name: All
comment: Root of all terms.

[Term]
id: HP:0000002
name: Short stature
def: "Height below \"normal\" for\nage." [ORCID:1]
comment: Said of\, for example, children.

[Term]
id: HP:0000003
name: Tall stature
def: "Height above normal." [ORCID:2]
"""


def _zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_medical_documents_are_defined_terms_unescaped(tmp_path: Path) -> None:
    wheel = _zip(tmp_path / "w.whl", {"data/hp.obo": OBO})
    assert list(corpora.medical_documents(wheel, "data/hp.obo")) == [
        ("HP:0000002", 'Short stature\nHeight below "normal" for\nage.\nSaid of, for example, children.'),
        ("HP:0000003", "Tall stature\nHeight above normal."),
    ]


def test_general_documents_are_chapters_of_long_texts_without_html(tmp_path: Path) -> None:
    long_text = "A long &amp; winding   text. " * 20
    country = {
        "Introduction": {"Background": {"text": f"<p>{long_text}</p>"}},
        "Geography": {"Area": {"text": "12 sq km"}, "Note": {"text": long_text}, "Climate": {"text": long_text}},
        "Economy": {"GDP": {"text": "$1"}},
    }
    wheel = _zip(tmp_path / "w.whl", {"data/x/aa.json": json.dumps(country), "data/readme.txt": "no"})
    documents = dict(corpora.general_documents(wheel, "data"))
    clean = ("A long & winding text. " * 20).strip()
    assert documents == {"aa/Introduction": clean, "aa/Geography": f"{clean}\n\n{clean}"}


def test_jsonl_holds_each_document_on_its_line(tmp_path: Path) -> None:
    documents = [("a", "one\ntwo"), ("b", "naïve\u2028text")]
    assert corpora.write_jsonl(iter(documents), tmp_path / "c" / "x.jsonl") == 2
    lines = (tmp_path / "c" / "x.jsonl").read_text().rstrip("\n").split("\n")
    assert [tuple(json.loads(line).values()) for line in lines] == documents


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        corpora.write_jsonl(iter([]), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
