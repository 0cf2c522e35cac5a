"""Changes to a document's text. Each is a function from text to text; `cleaners` strings together what is asked.

The C4 line rules are those of Raffel et al. 2020 (T5), section 2.2.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

from megatron_cpt.corpus.filters.personal_data import masker
from megatron_cpt.corpus.readers.html_article import article_text
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.schema_processing import Clean

Cleaner = Callable[[str], str]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte, then a continuation byte, each as a character. ftfy's own test
# reads the whole text with a large expression, so it is asked only where this finds something.
_MAYBE_MOJIBAKE = re.compile(r"[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u017e\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
_TRAILING_SPACE = " \t\u00a0\u3000"
_BLANK_LINES = re.compile(r"\n{3,}")
_TAG = re.compile(r"<(?:/?[a-zA-Z]|!DOCTYPE)[^<>]*>")
_MAX_MARKS = 30
_C4_ENDS = tuple(".!?\"'。！？”’")
_C4_MIN_WORDS = 3
_C4_POLICY = re.compile("javascript|terms of use|privacy policy|cookie policy|uses? cookies|use of cookies").search


def cleaners(clean: Clean) -> list[Cleaner]:
    """The functions that `clean` asks for beside `html`, in its documented order."""
    chosen: list[Cleaner] = []
    if clean.unicode:
        chosen.append(repair_unicode)
    if clean.whitespace:
        chosen.append(tidy_whitespace)
    if clean.c4_lines:
        chosen.append(keep_c4_lines)
    if clean.drop_lines:
        chosen.append(line_dropper(clean.drop_lines))
    if clean.pii:
        chosen.append(masker(clean.pii))
    return chosen


def html_cleaner(clean: Clean) -> Cleaner | None:
    """What `clean.html` does to a text that is no page. Raises DataError for a package that is missing."""
    if clean.html != "article":
        return strip_html if clean.html else None
    article_text("")  # a package that is missing is said before the start
    return strip_to_article


def strip_html(text: str) -> str:
    """The text of HTML; a text without a tag or a comment is left as it is."""
    return html_to_text(text) if _has_markup(text) else text


def strip_to_article(text: str) -> str:
    """The main content of HTML; a text without a tag or a comment is left as it is."""
    return article_text(text) if _has_markup(text) else text


def _has_markup(text: str) -> bool:
    start = text.find("<!--")
    return _TAG.search(text) is not None or (start >= 0 and text.rfind("-->") >= start + len("<!--"))


def repair_unicode(text: str) -> str:
    """Undo encoding mix-ups where ftfy sees one, drop control characters, normalise to NFC."""
    if not text.isascii():
        if _MAYBE_MOJIBAKE.search(text):
            from ftfy import fix_encoding
            from ftfy.badness import is_bad

            text = fix_encoding(text) if is_bad(text) else text
        text = "".join(map(_nfc, _long_mark_runs().split(text)))
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    return _CONTROL.sub("", text)


def _nfc(piece: str) -> str:
    """NFC of a text; a run of too many marks, which would be sorted in quadratic time, stays as it is."""
    return piece if _long_mark_runs().match(piece) else unicodedata.normalize("NFC", piece)


@cache
def _long_mark_runs() -> re.Pattern[str]:
    """Finds runs of more combining marks than any language has (UAX 15, stream-safe text format: 30)."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{{_MAX_MARKS + 1},}})")


def tidy_whitespace(text: str) -> str:
    """Indentation stays: code and lists need it."""
    lines = (line.rstrip(_TRAILING_SPACE) for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def keep_c4_lines(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if _is_c4_line(line.strip()))


def _is_c4_line(line: str) -> bool:
    if not line.endswith(_C4_ENDS) or line.endswith("...") or len(line.split()) < _C4_MIN_WORDS:
        return False
    return _C4_POLICY(line.lower()) is None


def line_dropper(patterns: tuple[str, ...]) -> Cleaner:
    searches = [re.compile(pattern).search for pattern in patterns]

    def drop(text: str) -> str:
        return "\n".join(line for line in text.split("\n") if not any(search(line) for search in searches))

    return drop
