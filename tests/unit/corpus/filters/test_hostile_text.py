"""Every cleaner, mask and filter takes linear time: 1 MB of the text it likes least, well within a document's limit."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.dedup.passages import cut_texts
from megatron_cpt.corpus.dedup.signatures import exact_keys
from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.bad_words import BadWordFilter
from megatron_cpt.corpus.filters.build import build_steps
from megatron_cpt.corpus.filters.chunking import chunk_texts
from megatron_cpt.corpus.filters.cleaning import (
    keep_c4_lines,
    line_dropper,
    repair_unicode,
    strip_html,
    strip_to_article,
    tidy_whitespace,
)
from megatron_cpt.corpus.filters.personal_data import masker
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema_processing import BadWords, Clean, Filters, Passages
from tests.unit.corpus.conftest import TEXTS, write_jsonl

SIZE = 1_000_000
# Processor time, not the clock's. What is linear takes a second or two; what is quadratic takes minutes to hours.
LIMIT_SECONDS = 20


def repeated(text: str) -> str:
    return (text * (SIZE // len(text) + 1))[:SIZE]


HTML = {
    "unclosed comments": "<p>" + repeated("<!-- x"),
    "open tags": repeated("<a"),
    "one endless tag": "<a" + repeated(" b"),
    "one tag of many attributes": "<a " + " ".join(f"b{i}=1" for i in range(SIZE // 10)) + ">",
    "nested blocks": repeated("<div>"),
    "nested chrome": repeated("<header>"),
    "nested content with chrome": repeated("<article><header>"),
    "nested tables": repeated("<table><td>x"),
    "nested lists": repeated("<ul><li>"),
    "nested exponents": repeated("<sup>2"),
    "unclosed formatting": "".join(f"<b id={i}>" for i in range(20_000)) + repeated("<p>x"),
    "crossed formatting": repeated("<b><i>x</b>y</i>"),
    "many links": repeated("<a href=x>"),
    "verbatim in verbatim": repeated("<pre>x"),
    "a piece of text in each element": repeated("<i>x</i>"),
    "rows without a table": repeated("<td>x</td></tr>"),
    "no-break spaces": "<p>x" + repeated("\u00a0 "),
    "empty cells": "<table><tr>" + repeated("<td>"),
    "title in nested headers": repeated("<header>")[:-4] + "<h1>x",
    "marks of ours": repeated("\ufdd0\ufddd\ufde0<p>"),
}  # fmt: skip
SPACES = {
    "spaces": repeated(" ") + "x",
    "tabs and spaces": repeated(" \t") + "x",
    "no-break spaces": repeated("\u00a0") + "x",
    "line ends": repeated("\n"),
    "short blank lines": repeated(" \n"),
    "carriage returns": repeated("\r"),
}
UNICODE = {
    "mojibake": repeated("â€œÃ©"),
    "doubled mojibake": repeated("Ã¢â‚¬"),
    "combining marks": "a" + repeated("\u0323\u0301\u0316"),
    "jamo": repeated("\u1100\u1161\u11a8"),
}
PERSONAL = {
    "at signs": repeated("a@"),
    "one long name": repeated("a") + "@",
    "a name of dots": repeated("a.b-") + "@b.c",
    "a domain without end": "a@" + repeated("b."),
    "hyphens in a domain": "a@" + repeated("b-"),
    "digits": repeated("1"),
    "spaced digits": repeated("4 "),
    "card after card": repeated("4111 1111 1111 1111 "),
    "octets": repeated("1.2.3."),
    "colons": repeated("a:"),
    "hexadecimal": repeated("ab12") + "::",
    "country codes": repeated("+1 "),
    "area codes": repeated("+123 (1234) 1234-"),
    "security numbers": repeated("123-45-"),
}
PROSE = {
    "one word": repeated("a"),
    "one word again and again": repeated("spam "),
    "sentences": repeated("A. "),
    "bullets": repeated("- x\n"),
    "ellipses": repeated("..."),
    "comments": repeated("# "),
    "empty lines with indentation": repeated("    \n"),
    "open brackets": repeated("("),
    "han": repeated("法"),
}


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def rows(functions: list[Callable[[str], Any]], texts: dict[str, str]) -> list[Any]:
    return [
        pytest.param(function, text, id=f"{getattr(function, '__name__', 'step')}: {name}")
        for function in functions
        for name, text in texts.items()
    ]


def all_masks(text: str) -> str:
    return masker(("email", "phone", "ip", "ssn", "card"))(text)


def dropped_lines(text: str) -> str:
    return line_dropper((r"^\s*(?:Share|Tweet) on", r"(?i)all rights reserved"))(text)


def sentence_chunks(text: str) -> Any:
    return chunk_texts([text], "sentences", 1000, 0)


def passages(text: str) -> Any:
    return cut_texts([text], Passages())


def exact_key(text: str) -> Any:
    return exact_keys([text])


def bad_words(text: str) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as words:
        words.write("spam\nspam spam\nspam spam ham\n法律\n")
        words.flush()
        return BadWordFilter(BadWords(file=words.name))(Batch("x", [text], [1]), UnitTally())


def heuristics(text: str) -> Any:
    filters = Filters.model_validate({"gopher_quality": True, "gopher_repetition": True, "fineweb": True, "c4": True})
    return through(filters, text)


def code(text: str) -> Any:
    return through(Filters.model_validate({"code": {"max_line_chars": 10**9, "max_mean_line_chars": 1e9}}), text)


def python_code(text: str) -> Any:
    limits = {"max_line_chars": 10**9, "max_mean_line_chars": 1e9, "python_must_parse": True}
    return through(Filters.model_validate({"code": limits}), text)


def language(text: str) -> Any:
    pytest.importorskip("fasttext")
    return through(Filters.model_validate({"language": {"keep": ["en"]}}), text)


def through(filters: Filters, text: str) -> list[Any]:
    steps = build_steps(Clean(), filters, True, LIMIT_SECONDS)
    assert steps
    tally = UnitTally()
    for step in steps:
        step(Batch("x", [text], [1]), tally)
    assert "too_slow" not in tally.counts
    return steps


CASES = [
    *rows([strip_html, strip_to_article], HTML),
    *rows([tidy_whitespace, repair_unicode, keep_c4_lines, dropped_lines, passages, exact_key], SPACES),
    *rows([repair_unicode], UNICODE),
    *rows([all_masks], PERSONAL),
    *rows([keep_c4_lines, sentence_chunks, passages, bad_words, heuristics, code, python_code, language], PROSE),
]


@pytest.mark.parametrize(("function", "text"), CASES)
def test_a_megabyte_of_hostile_text_takes_linear_time(function: Callable[[str], Any], text: str) -> None:
    with processor_time(LIMIT_SECONDS):
        function(text)


def test_a_document_over_the_time_limit_is_a_counted_reject_and_the_others_stay(
    tmp_path: Path, make_corpus: Any
) -> None:
    slow = "a" * 60 + "!"  # the expression tries every way to cut it
    file = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, slow, *TEXTS, slow, "short"])
    corpus = make_corpus(file, clean={"drop_lines": ["^(a+)+$"]}, filters={"min_chars": 10}, max_document_seconds=0.3)
    outcome = preprocess(corpus, workers=2)
    assert outcome.rejects == {"too_slow": 2, "too_short": 1}
    (manifest,) = outcome.datasets.values()
    assert manifest.document_count == 2 * len(TEXTS)
    rejects = [json.loads(line) for line in Path(f"{corpus.output_prefix}.rejects.jsonl").read_text().splitlines()]
    assert [(reject["reason"], reject["line"]) for reject in rejects] == [
        ("too_slow", len(TEXTS) + 1),
        ("too_slow", 2 * len(TEXTS) + 2),
        ("too_short", 2 * len(TEXTS) + 3),
    ]
