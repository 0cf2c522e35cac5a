"""Text out of HTML: blocks become lines, what a reader does not read (scripts, styles, navigation) goes."""

from __future__ import annotations

import re

from selectolax.lexbor import LexborHTMLParser

_DROPPED = "script, style, noscript, template, head, nav, header, footer, aside, form, iframe, svg"
_BLOCKS = "p, div, li, ul, ol, h1, h2, h3, h4, h5, h6, tr, table, pre, blockquote, section, article, dt, dd, hr"
_SPACES = re.compile(r"[ \t\r\f\v\u00a0]+")
_BLANK_LINES = re.compile(r"\n\s*\n+")


def html_to_text(html: str) -> str:
    """The visible text, one line per block, paragraphs apart by at most one blank line."""
    tree = LexborHTMLParser(html)
    for node in tree.css(_DROPPED):
        node.decompose()
    for node in tree.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    for node in tree.css("br"):
        node.insert_after("\n")
    if tree.body is None:
        return ""
    lines = (_SPACES.sub(" ", line).strip() for line in tree.body.text(deep=True).split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()
