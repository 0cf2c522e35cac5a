"""Filters and cleaning: the vectorised rules against plain ones, thresholds, counted reasons."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.build import build_steps
from megatron_cpt.corpus.filters.cleaning import (
    keep_c4_lines,
    line_dropper,
    repair_unicode,
    strip_html,
    tidy_whitespace,
)
from megatron_cpt.corpus.filters.code_quality import code_problem
from megatron_cpt.corpus.filters.personal_data import masker
from megatron_cpt.corpus.filters.text_statistics import TextStatistics
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema_processing import Clean, CodeQuality, Filters
from megatron_cpt.errors import ConfigError, DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl

GOOD = (
    "The committee met on Tuesday to review the plan that the council had approved in the spring of last year. "
    "Members of the public were invited to speak, and several of them asked about the cost of the new bridge. "
    "An engineer explained that the foundations would have to be deeper than anyone had expected at first.\n"
    "After a long discussion the chair thanked everyone with a smile and closed the meeting before sunset."
)


def reasons(text: str, **filters: Any) -> dict[str, int]:
    """What the filters say of one document."""
    tally, batch = UnitTally(), Batch("f", [text], [1])
    for step in build_steps(Clean(), Filters.model_validate(filters), keep_empty=True, max_document_seconds=30):
        batch = step(batch, tally)
    assert len(batch) + sum(tally.counts.values()) == 1
    return dict(tally.counts)


def plain_words(text: str) -> list[str]:
    """The definition of a word, one character at a time."""
    words, current = [], ""
    for char in text:
        cjk = any(first <= ord(char) < stop for first, stop in ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000)))
        if char.isspace() or cjk:
            words += [current] if current else []
            words += [char] if cjk else []
            current = ""
        else:
            current += char
    return words + ([current] if current else [])


def plain_repeats(items: list[str]) -> int:
    return sum(count - 1 for count in Counter(items).values())


_document = st.text(alphabet="ab c\n.中#", max_size=80)


@settings(max_examples=300, deadline=None)
@given(st.lists(_document, min_size=1, max_size=5))
def test_statistics_equal_plain_counting(texts: list[str]) -> None:
    statistics = TextStatistics(texts)
    words = [plain_words(text) for text in texts]
    lines = [[line.strip() for line in text.split("\n") if line.strip()] for text in texts]
    assert statistics.word_counts.tolist() == [len(w) for w in words]
    assert statistics.total(statistics.words.documents, statistics.words.lengths).tolist() == [
        sum(map(len, w)) for w in words
    ]
    assert statistics.total(statistics.lines.documents).tolist() == [len(row) for row in lines]
    assert statistics.total(statistics.lines.documents, statistics.lines.repeated()).tolist() == [
        plain_repeats(row) for row in lines
    ]
    assert statistics.total(statistics.words.documents, statistics.words.repeated()).tolist() == [
        plain_repeats(w) for w in words
    ]
    assert statistics.words_present(["a", "ab", "中"]).tolist() == [len({"a", "ab", "中"} & set(w)) for w in words]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["aa", "b", "ccc"]), max_size=25), min_size=1, max_size=4))
def test_ngram_shares_equal_plain_counting(documents: list[list[str]]) -> None:
    texts = [" ".join(words) for words in documents]
    statistics = TextStatistics(texts)
    repeated = statistics.repeated_ngram_ratios([2, 3, 4])
    for n in (2, 3, 4):
        for index, words in enumerate(documents):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            top = max([count * len(" ".join(g)) for g, count in Counter(grams).items() if count > 1], default=0)
            assert statistics.top_ngram_ratio(n)[index] == pytest.approx(top / max(len(texts[index]), 1))
            covered = {j for i, g in enumerate(grams) if g in grams[:i] for j in range(i, i + n)}
            chars = sum(len(words[j]) + 1 for j in covered)
            assert repeated[n][index] == pytest.approx(chars / max(len(texts[index]), 1))


def test_a_document_is_judged_alike_alone_and_in_company() -> None:
    texts = [GOOD, "a\n" * 50, GOOD.replace(" ", "  "), "", "中文" * 40, "- x\n- y..."]
    alone = [TextStatistics([text]) for text in texts]
    together = TextStatistics(texts)
    for n in (2, 5):
        assert np.allclose([a.top_ngram_ratio(n)[0] for a in alone], together.top_ngram_ratio(n))
        assert np.allclose([a.repeated_ngram_ratios([n])[n][0] for a in alone], together.repeated_ngram_ratios([n])[n])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("Too short to keep.", "gopher_word_count"),
        ("incomprehensibilities internationalization " * 40, "gopher_mean_word_length"),
        (GOOD + " #" * 20, "gopher_symbol_ratio"),
        ("\n".join("- " + part for part in GOOD.replace("\n", " ").rstrip(".").split(".")), "gopher_bullet_lines"),
        (GOOD.replace(". ", "...\n"), "gopher_ellipsis_lines"),
        (GOOD + " 12345" * 40, "gopher_alphabetic_words"),
        (("alpha beta gamma delta " * 40).strip(), "gopher_stop_words"),
    ],
)
def test_gopher_quality_names_the_rule(text: str, reason: str | None) -> None:
    assert reasons(text, gopher_quality=True) == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("\n".join(["the same line again", "another line here"] * 10), "gopher_repeated_lines"),
        (GOOD + "\n\nA paragraph\nof two\n\nA paragraph\nof two\n\nthree\nfour", None),
        (" ".join(f"word{i} tick tock" for i in range(60)), "gopher_top_2gram"),
        (GOOD + " " + GOOD[:220], "gopher_repeated_5gram"),
    ],
)
def test_gopher_repetition_names_the_rule(text: str, reason: str | None) -> None:
    assert reasons(text, gopher_repetition=True) == ({reason: 1} if reason else {})


def test_fineweb_c4_and_thresholds_of_ones_own() -> None:
    assert reasons(GOOD, fineweb=True, c4=False) == {}
    assert reasons("no end mark here at all in this line\n" * 1, fineweb=True) == {"fineweb_line_punctuation": 1}
    assert reasons("\n".join(f"Short {i}." for i in range(9)), fineweb=True) == {"fineweb_short_lines": 1}
    assert reasons(GOOD + "\n" + GOOD, fineweb=True) == {"fineweb_repeated_lines": 1}
    assert reasons(GOOD, c4=True) == {"c4_few_sentences": 1}
    assert reasons(GOOD + " Yes. No. " + "{", c4=True) == {"c4_curly_bracket": 1}
    assert reasons("Too short to keep.", gopher_quality={"min_words": 3, "min_stop_words": 0}) == {}
    chinese = "为了保护当事人的合法权益，制定本法。" * 5
    assert reasons(chinese, gopher_quality=True) == {"gopher_mean_word_length": 1}
    assert reasons(chinese, gopher_quality={"min_mean_word_length": 1, "stop_words": []}) == {}


def test_language() -> None:
    pytest.importorskip("fasttext")
    assert reasons(GOOD, language={"keep": ["en"]}) == {}
    assert reasons(TEXTS[3] * 5, language={"keep": ["en"]}) == {"language": 1}
    assert reasons(TEXTS[3] * 5, language={"keep": ["en", "zh"]}) == {}


def test_code_rules() -> None:
    limits = CodeQuality(python_must_parse=True, min_comment_ratio=0.1)
    good = "# adds\ndef add(a, b):\n    return a + b\n"
    assert code_problem(good, limits) is None
    for text, problem in {
        "x = 1\n" * 3: "code_comment_ratio",
        "# c\nx = '" + "a" * 2000 + "'": "code_long_line",
        "# c\n" + ("y = " + "b" * 300 + "\n") * 3: "code_mean_line_length",
        "# ----\n" + "((((((((((((((((((((\n" * 3: "code_alphanumeric_ratio",
        "# python 2\nprint 'hello'\n": "code_does_not_parse",
    }.items():
        assert code_problem(text, limits) == problem


def test_cleaning_functions() -> None:
    assert repair_unicode("The caf\u00c3\u00a9 said \u00e2\u20ac\u0153hi\u00e2\u20ac\x9d\x07\r\n") in (
        "The café said “hi”\n", 'The café said "hi"\n')  # fmt: skip
    assert repair_unicode("e\u0301 ok 中文") == "é ok 中文"
    assert tidy_whitespace("\n\na  \n\n\n\n    indented\t\n") == "a\n\n    indented"
    assert strip_html("<p>a &lt; b</p>") == "a < b" and strip_html("if a < b and c > d:") == "if a < b and c > d:"
    assert keep_c4_lines("Menu\nThis line stays here.\nPlease read our privacy policy now.\nEnds in dots...") == (
        "This line stays here."
    )
    assert line_dropper(("^Share on", "(?i)all rights reserved"))("Share on X\nkept\n(c) All Rights Reserved") == "kept"


PERSONAL = {
    "Mail john.doe+x@mail.example.org now": "Mail [EMAIL] now",
    "SSN 123-45-6789.": "SSN [ID].",
    "not issued 000-12-3456 or 123-00-6789": None,
    "card 4111 1111 1111 1111, or 4111-1111-1111-1111": "card [CARD], or [CARD]",
    "no card 4111 1111 1111 1112": None,
    "call +1 212 555 0123 or (212) 555-0123": "call [PHONE] or [PHONE]",
    "手机13800138000。": "手机13800138000。",
    "host 192.0.2.7 and 2001:db8::1": "host [IP] and [IP]",
    "version 1.2.3 at 12:30:45, 999.1.2.3, section 4.3.2.1.5": None,
    "pi 3.14159265358979, 2024-02-29, ISBN 978-3-16-148410-0": None,
    "localhost 127.0.0.1": None,
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data(text: str) -> None:
    expected = PERSONAL[text] or text
    assert masker(("email", "phone", "ip", "ssn", "card"))(text) == expected


def keep_long_and_shout(text: str) -> bool | str:
    return text.upper() if len(text) > 60 else False


def test_run_counts_reasons_and_user_filters_work(tmp_path: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    custom = "tests.unit.corpus.filters.test_filters:keep_long_and_shout"
    outcome = preprocess(make_corpus(file, filters={"min_chars": 30, "custom": [custom]}), workers=1)
    assert outcome.rejects == {"too_short": 1, f"custom:{custom}": 2}
    assert outcome.rejects_file is not None
    details = [json.loads(line) for line in Path(outcome.rejects_file).read_text().splitlines()]
    assert [d["line"] for d in details] == [3, 4, 5] and details[0]["detail"].startswith("def add")
    (manifest,) = outcome.datasets.values()
    assert manifest.document_count == 2
    with pytest.raises(ConfigError, match="cannot be loaded"):
        preprocess(make_corpus(file, filters={"custom": ["no_such_module:f"]}), workers=1, overwrite=True)


def test_a_source_may_have_its_own_filters(tmp_path: Path, make_corpus: Any) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", TEXTS) for n in "ab"]
    sources = [
        {"name": "a", "files": str(files[0]), "filters": {"max_chars": 50}},
        {"name": "b", "files": str(files[1])},
    ]
    outcome = preprocess(make_corpus(sources=sources, filters={"min_chars": 90}), workers=1)
    (manifest,) = outcome.datasets.values()
    assert {s.name: s.documents for s in manifest.sources} == {
        "a": sum(len(t) <= 50 for t in TEXTS), "b": sum(len(t) >= 90 for t in TEXTS)}  # fmt: skip


def test_bad_words_are_found_as_c4_finds_them(tmp_path: Path, make_corpus: Any) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\ufeffBad\nvery  bad\nf-word\n坏词\n\nbad\n", encoding="utf-8")
    texts = {
        "A Bad day.": True, "badger and badly": False, "not_bad": False, "the f-word!": True, "the f-words": False,
        "这是坏词吗": True, "fine": False, "(BAD)": True, "bad": True, "这bad的": False,
    }  # fmt: skip
    file = write_jsonl(tmp_path / "a.jsonl", list(texts))
    outcome = preprocess(make_corpus(file, filters={"bad_words": str(listed)}), workers=1)
    assert outcome.rejects == {"bad_words": sum(texts.values())}
    assert outcome.rejects_file is not None
    lines = [json.loads(row)["line"] for row in Path(outcome.rejects_file).read_text().splitlines()]
    assert lines == [i for i, is_bad in enumerate(texts.values(), 1) if is_bad]
    everywhere = make_corpus(file, filters={"bad_words": {"file": str(listed), "substrings": True}})
    assert preprocess(everywhere, workers=1, overwrite=True).rejects["bad_words"] == 9
    listed.write_text("fine\n")  # another list is another corpus
    with pytest.raises(DataError, match="another input, configuration"):
        preprocess(everywhere, workers=1)


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"\n \n", "no entry"), (b"\xff", "UTF-8")])
def test_bad_words_without_a_list(tmp_path: Path, make_corpus: Any, content: bytes | None, message: str) -> None:
    listed = tmp_path / "list.txt"
    if content is not None:
        listed.write_bytes(content)
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=message):
        preprocess(make_corpus(file, filters={"bad_words": str(listed)}), workers=1)


def test_every_reject_of_a_filter_says_the_value_and_the_limit(tmp_path: Path, make_corpus: Any) -> None:
    pytest.importorskip("fasttext")
    texts = [GOOD, "too short", GOOD + " #" * 20, "word " * 60]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    filters = {"min_chars": 20, "gopher_quality": True, "gopher_repetition": True}
    corpus = make_corpus(file, filters=filters, warn_filter_ratio=0.5)
    preprocess(corpus, workers=1)
    rejects = [json.loads(line) for line in Path(f"{corpus.output_prefix}.rejects.jsonl").read_text().splitlines()]
    details = {reject["reason"]: reject["detail"] for reject in rejects}
    assert details["too_short"].startswith("9 characters, allowed at least 20: too short")
    assert re.match(r"0\.\d+, allowed at most 0\.1: The committee", details["gopher_symbol_ratio"])
    assert details["gopher_stop_words"].startswith("0, allowed at least 2: word")
    python = Filters.model_validate({"code": {"max_line_chars": 10, "max_mean_line_chars": 1000}})
    tally = UnitTally()
    for step in build_steps(Clean(), python, keep_empty=True, max_document_seconds=30):
        step(Batch("f", ["x = 1  # twenty characters"], [1]), tally)
    assert tally.rejects[0].detail.startswith("26 characters, allowed at most 10")


def test_a_filter_that_takes_more_than_the_stated_share_is_told(
    tmp_path: Path, make_corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 8 + ["tiny"] * 2)
    preprocess(make_corpus(file, filters={"min_chars": 20}, warn_filter_ratio=0.2), workers=1)
    assert "dropped" not in caplog.text
    corpus = make_corpus(file, filters={"min_chars": 20}, warn_filter_ratio=0.1)
    for path in tmp_path.glob("**/*.manifest.json"):
        path.unlink()
    for path in [*tmp_path.glob("**/*.bin"), *tmp_path.glob("**/*.idx")]:
        path.unlink()
    preprocess(corpus, workers=1)
    assert "filters.min_chars dropped 2 of 10 documents (20.0%; too_short 2)" in caplog.text
    assert "a.jsonl:9: 4 characters, allowed at least 20: tiny" in caplog.text
    assert "lower filters.min_chars" in caplog.text


def test_a_preset_is_its_filters_and_a_stated_filter_replaces_its_own() -> None:
    assert Filters.model_validate({"preset": "web"}).fineweb is not None
    technical = Filters.model_validate({"preset": "technical", "min_chars": 5})
    assert technical.min_chars == 5 and technical.gopher_quality is not None
    assert technical.gopher_quality.min_stop_words == 1 and technical.fineweb is None
    assert Filters.model_validate({"preset": "technical", "gopher_repetition": False}).gopher_repetition is None
    assert Filters.model_validate({"preset": "code"}).code is not None
    books = Filters.model_validate({"preset": "books"})
    assert books.gopher_quality is not None and books.gopher_quality.max_words == 10_000_000
    with pytest.raises(ValueError, match="preset"):
        Filters.model_validate({"preset": "poems"})


def test_the_presets_keep_what_they_are_for() -> None:
    """A page of reference with a table and code is dropped as a web page and kept as technical text."""
    reference = "\n".join(
        f"option_{n} | integer | {n} | Sets the {n} of the cache. See cache_{n} and the limit of it." for n in range(30)
    )
    assert reasons(reference, preset="technical") == {}
    assert reasons(reference, preset="web") != {}
