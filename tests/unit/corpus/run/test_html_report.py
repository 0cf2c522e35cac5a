"""The report: self-contained, escaped, and its numbers are the run's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.run.html_report import balance_notes
from megatron_cpt.corpus.run.preprocess import preprocess
from tests.unit.corpus.conftest import TEXTS, write_jsonl
from tests.unit.corpus.dedup.test_dedup import document


class Tags(HTMLParser):
    """Collects tags and checks that tables and details close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}
        if tag in ("table", "details", "tr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "details", "tr"):
            assert self.open.pop() == tag


def test_report_of_a_run(tmp_path: Path, make_corpus: Any) -> None:
    pytest.importorskip("fasttext")
    texts = [*TEXTS, document(1), document(1), "short", "<script>alert(1)</script> mm"]
    described = [
        {"name": "a", "files": str(write_jsonl(tmp_path / "a.jsonl", texts))},
        {"name": "b <tag>", "files": str(write_jsonl(tmp_path / "b.jsonl", [document(i) for i in range(2, 9)]))},
    ]
    filters = {"min_chars": 30, "language": {"keep": ["en", "zh", "la", "es", "it", "pt", "fr", "ro"], "min_score": 0}}
    corpus = make_corpus(sources=described, filters=filters, dedup=True, train_tokens=100_000)
    outcome = preprocess(corpus, workers=1)
    page = Path(f"{corpus.output_prefix}.report.html").read_text().replace("<wbr>", "")
    parser = Tags()
    parser.feed(page)
    assert not parser.open and "script" not in parser.tags and parser.tags.count("table") >= 5
    assert "&lt;script&gt;alert(1)" in page and "b &lt;tag&gt;" in page
    (manifest,) = outcome.datasets.values()
    for number in (outcome.documents_read, manifest.token_count, manifest.document_count):
        assert f"{number:,}" in page
    assert outcome.rejects["too_short"] == 3 and re.search(r"too_short</td><td>-3</td>", page)
    steps = re.findall(r"<tr><td>([a-z_]+)</td><td>-", page)
    assert steps[0] == "too_short" and steps[-1].startswith("duplicate") and steps[1:-1] in ([], ["language"])
    assert "Samples of what was kept" in page and "The patient presented with acute fever" in page
    for words in (f"megatron-cpt {manifest.tool_version}", "prefers-color-scheme:dark", "width=device-width", "<svg"):
        assert words in page
    assert f"{manifest.tokenizer.fingerprint[:12]}" in page and "min_chars: 30" in page
    assert "Languages before the filter" in page and "1 document repeats 1 other. The most" in page


def test_advice_names_its_numbers() -> None:
    assert balance_notes({"a": 100}, None) == []
    notes = " ".join(balance_notes({"big": 99_500, "small": 500}, 1_000_000))
    assert "small is 0.50%" in notes and "big is 100%" in notes
    assert "10.00 epochs" in notes and "worth much less" in notes
