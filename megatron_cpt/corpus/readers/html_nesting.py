"""Limits on how deep elements nest and on how many attributes they have, so that parsing takes linear time and memory.

An HTML parser walks its stack of open elements at many a tag, opens all unclosed formatting elements again in every
paragraph, and compares the attributes of a tag with each other. 1 MB of `<div>` takes it minutes; a thousand
`<b id=...>` before a hundred thousand `<p>` take all memory. Browsers have such limits too (Chromium: 512 levels).
Only tags and attributes go, never text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from operator import sub

MAX_DEPTH = 512
MAX_FORMATTING_DEPTH = 8
MAX_ATTRIBUTES = 500

_FORMATTING_NAMES = "a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u"
# They have no end tag, or need none: the parser closes them by itself before the next.
_NAMES_WITHOUT_END = (
    "area|base|body|br|caption|col|colgroup|dd|dt|embed|head|hr|html|img|input|li|link|meta|optgroup|option|p|param|rb|rp|"
    "rt|source|tbody|td|tfoot|th|thead|tr|track|wbr|"
    "circle|ellipse|image|line|path|polygon|polyline|rect|stop|use"  # of SVG, and written <path .../>
)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>?")
_FORMATTING = re.compile(_FORMATTING_NAMES)
_WITHOUT_END = re.compile(_NAMES_WITHOUT_END)
_FORMATTING_TAGS = re.compile(rf"<(/?)(?:{_FORMATTING_NAMES})(?![a-z0-9])", re.IGNORECASE)
_OTHER_TAGS = re.compile(rf"<(/?)(?!(?:{_FORMATTING_NAMES}|{_NAMES_WITHOUT_END})(?![a-z0-9]))[a-z]", re.IGNORECASE)
_LONG_TAG = re.compile(rf"<[a-zA-Z][^<>]{{{2 * MAX_ATTRIBUTES}}}")


def limit_nesting(html: str) -> str:
    """Return `html` without tags of elements that lie too deep and without attributes of tags with too many."""
    within_limits = (
        _LONG_TAG.search(html) is None
        and _depth(_FORMATTING_TAGS.findall(html)) <= MAX_FORMATTING_DEPTH
        and _depth(_OTHER_TAGS.findall(html)) <= MAX_DEPTH
    )
    if within_limits:  # nearly always; found without a Python loop over the tags
        return html
    limits = _Depths()
    return _TAG.sub(lambda match: _replacement(match, limits.too_deep(match)), html)


def _depth(slashes: list[str]) -> int:
    """The largest number of open elements; `slashes` has "" for a start tag and "/" for an end tag, in order."""
    balance = list(accumulate((-1 if slash else 1 for slash in slashes), initial=0))
    depths: Iterator[int] = map(sub, balance, accumulate(balance, min))
    return max(depths)  # an end tag without a start closes nothing


def _replacement(tag: re.Match[str], too_deep: bool) -> str:
    if too_deep:  # a block puts the text before and after it apart
        return "" if _FORMATTING.fullmatch(tag[2].lower()) else "\n"
    return f"<{tag[1]}{tag[2]}>" if _has_too_many_attributes(tag) else tag[0]


def _has_too_many_attributes(tag: re.Match[str]) -> bool:
    start, end = tag.span()
    return end - start > 2 * MAX_ATTRIBUTES and len(tag[0].split(None, MAX_ATTRIBUTES + 1)) > MAX_ATTRIBUTES + 1


class _Depths:
    """Counts open elements, tag by tag."""

    def __init__(self) -> None:
        self._open = {True: 0, False: 0}  # formatting elements; all others

    def too_deep(self, tag: re.Match[str]) -> bool:
        name = tag[2].lower()
        if _WITHOUT_END.fullmatch(name):
            return False
        formatting = _FORMATTING.fullmatch(name) is not None
        limit = MAX_FORMATTING_DEPTH if formatting else MAX_DEPTH
        if tag[1]:
            depth = self._open[formatting]
            self._open[formatting] = max(depth - 1, 0)
            return depth > limit
        self._open[formatting] += 1
        return self._open[formatting] > limit
