"""A limit on how deep the elements of a page may nest, so that parsing takes linear time and memory.

An HTML parser walks its stack of open elements at many a tag, and opens all unclosed formatting elements again in every
paragraph: 1 MB of `<div>` takes minutes, and a thousand `<b id=...>` before a hundred thousand `<p>` take all memory.
Browsers have such limits too (Chromium: 512 levels). Only tags go, never text.
"""

from __future__ import annotations

import re

MAX_DEPTH = 512
MAX_FORMATTING_DEPTH = 8

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>?")
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
# They have no end tag, or need none: the parser closes them by itself before the next.
_WITHOUT_END = frozenset(
    "area base body br caption col colgroup dd dt embed head hr html img input li link meta optgroup option p param rb "
    "rp rt source tbody td tfoot th thead tr track wbr".split()
)


def limit_nesting(html: str) -> str:
    """Return `html` without the tags of elements that lie deeper than the limits."""
    if html.count("<") - html.count("</") <= MAX_FORMATTING_DEPTH:
        return html
    limits = _Depths()
    if not any(limits.too_deep(match) for match in _TAG.finditer(html)):
        return html
    limits = _Depths()
    return _TAG.sub(lambda match: _replacement(match) if limits.too_deep(match) else match[0], html)


def _replacement(tag: re.Match[str]) -> str:
    return "" if tag[2].lower() in _FORMATTING else "\n"  # a block puts the text before and after it apart


class _Depths:
    """Counts open elements, tag by tag."""

    def __init__(self) -> None:
        self._open = {True: 0, False: 0}  # formatting elements; all others

    def too_deep(self, tag: re.Match[str]) -> bool:
        name = tag[2].lower()
        if name in _WITHOUT_END:
            return False
        formatting = name in _FORMATTING
        limit = MAX_FORMATTING_DEPTH if formatting else MAX_DEPTH
        if tag[1]:
            depth = self._open[formatting]
            self._open[formatting] = max(depth - 1, 0)
            return depth > limit
        self._open[formatting] += 1
        return self._open[formatting] > limit
