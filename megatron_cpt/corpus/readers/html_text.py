"""Text out of HTML: blocks become lines, table cells stay apart, `<pre>` keeps its layout, what nobody reads goes.

`html_to_text` keeps everything but the page's chrome: scripts, navigation, and the header, footer and aside of the page
(those of an article, a section or `<main>` are content). html_article keeps less.

Nothing is removed from the parsed tree: marks are put around its elements, and the text between the marks is laid out
in one pass. So the time is linear in the page, however its elements are nested.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from selectolax.lexbor import LexborHTMLParser

from megatron_cpt.corpus.readers.html_nesting import limit_nesting

# Marks are noncharacters of Unicode, U+FDD0 to U+FDEF, which no page may contain; html_article uses others of them.
# The first five stand in gaps between pieces of text.
_MARK_CODES = range(0xFDD0, 0xFDDD)
_CELL, _LINE, _ROW, _PARAGRAPH, _BR, _PRE, _END_PRE, _DROP, _END_DROP, _CHROME, _END_CHROME, _CONTENT, _END_CONTENT = (
    map(chr, _MARK_CODES)
)
# selector -> the marks before and after its elements
_MARKS: dict[str, tuple[str | None, str]] = {
    "p, ul, ol, dl, menu, h1, h2, h3, h4, h5, h6, table, blockquote, details, fieldset, form, select, hr": (
        _PARAGRAPH,
        _PARAGRAPH,
    ),
    "tr": (_ROW, _ROW),
    "div, li, dt, dd, caption, figcaption, summary, legend, address, option, optgroup, button, label, center": (
        _LINE,
        _LINE,
    ),
    "br": (None, _BR),
    "td, th": (None, _CELL),
    "pre, textarea, listing, xmp, plaintext": (_PRE, _END_PRE),
    "article, main, section, figure": (_CONTENT, _END_CONTENT),
    "script, style, noscript, template, iframe, svg, nav, [role=navigation], [role=search], a.headerlink": (
        _DROP,
        _END_DROP,
    ),
}
# Of the page, unless within what is marked as content.
_CHROME_MARKS: dict[str, tuple[str | None, str]] = {"header, footer, aside": (_CHROME, _END_CHROME)}
# Looked for where the page has the word at all: the parser is slow in it.
_STYLE_MARKS: dict[str, tuple[str | None, str]] = {
    "[style*='white-space:pre'], [style*='white-space: pre']": (_PRE, _END_PRE)
}
_SECTIONS = re.compile(f"([{_PRE}-{_END_CONTENT}])")
_MARK = re.compile("[\ufdd0-\ufdef]+")
_FORBIDDEN = re.compile("[\ufdd0-\ufdef]|&#(?:[xX]0*[fF][dD][dDeE][0-9a-fA-F]|0*(?:6497[6-9]|649[89][0-9]|6500[0-7]))")
_GAP = re.compile(f"[ \n{_CELL}-{_BR}]*[\n{_CELL}-{_BR}][ \n{_CELL}-{_BR}]*")
_GAP_IN_PRE = re.compile(f"[{_CELL}-{_BR}]+")
_NEXT_ROW = re.compile(f"{_ROW}[ \n]*{_ROW}")
_SPACES = re.compile(r"[ \t\r\f\v]+")
_SPACES_AND_LINE_ENDS = re.compile(r"[ \t\r\n\f\v]+")
# They are indentation where they begin a line, as in code of <br> and &nbsp;, and else a space.
_NO_BREAK_SPACES = re.compile(r"(?<=\S)[ \u00a0]*\u00a0[ \u00a0]*")
_TABLE = re.compile(r"<[tT][aA][bB][lL][eE]\b")  # twice as fast as with a flag for the case
_PART_OF_TABLE = re.compile(r"<[tT](?:[aA][bB][lL][eE]|[dDhHrR])\b")
_CELL_OR_ROW = re.compile(r"<(/?)t(?:([dh])|r)\b[^<>]*>", re.IGNORECASE)
_WHOLE_PAGE = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
_NUMBER = re.compile(r"[+\u2212-]?\d+")


def html_to_text(html: str) -> str:
    """Return the text that a reader sees, without the page's chrome.

    One line per block, at most one blank line in a row; the cells of a table row are put apart by ` | `. `<pre>` and
    `<textarea>` keep their lines and indentation. In a whole page a line end of the source is a space, as in a
    browser; in a fragment (no html, head or body tag) it stays a line end: text with a few tags in it means it so.
    """
    tree = parse_page(html)
    is_title = "<header" in html and len(tree.css("h1")) == 1
    for header in tree.css("header:has(h1)") if is_title else ():
        header.insert_before(_CONTENT)
        header.insert_after(_END_CONTENT)
    return laid_out(tree, html, _MARKS | _CHROME_MARKS)


def parse_page(html: str) -> LexborHTMLParser:
    """Parse HTML within limits that make it linear, without the characters that are marks here."""
    html = _FORBIDDEN.sub(" ", html)
    first = _PART_OF_TABLE.search(html)
    if first and len(first[0]) == len("<td") and not _TABLE.search(html):  # a parser drops rows without a table
        html = _marked_rows(html)
    return LexborHTMLParser(limit_nesting(html))


def _marked_rows(html: str) -> str:
    """Marks in the place of the tags of rows and cells; end tags of cells may be missing."""
    begins = True  # a row

    def mark(tag: re.Match[str]) -> str:
        nonlocal begins
        if not tag[2]:
            begins = True
            return _ROW
        if tag[1]:
            return ""
        before, begins = _ROW if begins else _CELL, False
        return before

    return f"{_CELL_OR_ROW.sub(mark, html)}{_ROW}"


def laid_out(
    tree: LexborHTMLParser,
    html: str,
    marks: dict[str, tuple[str | None, str]] = _MARKS,
    select: Callable[[str], str] = str,
) -> str:
    """Return the text of a page that was parsed from `html`; `select` may take pieces out before it is laid out."""
    if tree.body is None:
        return ""
    marks = marks | _STYLE_MARKS if "white-space" in html else marks
    for selector, (before, after) in marks.items():
        for node in tree.css(selector):
            if before is not None:
                node.insert_before(before)
            node.insert_after(after)
    for node in tree.css("sup"):  # 2<sup>10</sup> is not 210; a number that is a link is a footnote's
        if _NUMBER.fullmatch(_MARK.sub("", node.text(deep=True)).strip()) and node.css_first("a") is None:
            node.insert_before("^")
    spaces = _SPACES_AND_LINE_ENDS if _WHOLE_PAGE.search(html) else _SPACES
    return _lay_out(select(tree.body.text(deep=True)), spaces)


def _lay_out(text: str, spaces: re.Pattern[str]) -> str:
    """Return the marked text as blocks, without what is dropped. The marks are well nested, as the elements were."""
    blocks = []
    dropping = verbatim = content = 0
    chrome_is_dropped: list[bool] = []
    for piece in _SECTIONS.split(text):
        if piece in (_PRE, _END_PRE):
            verbatim += 1 if piece == _PRE else -1
        elif piece in (_DROP, _END_DROP):
            dropping += 1 if piece == _DROP else -1
        elif piece in (_CONTENT, _END_CONTENT):
            content += 1 if piece == _CONTENT else -1
        elif piece == _CHROME:
            chrome_is_dropped.append(content == 0)
            dropping += chrome_is_dropped[-1]
        elif piece == _END_CHROME:
            dropping -= chrome_is_dropped.pop()
        elif not dropping:
            blocks.append(_verbatim(piece) if verbatim else _flowing(piece, spaces))
    return "\n\n".join(filter(None, blocks))


def _flowing(text: str, spaces: re.Pattern[str]) -> str:
    text = _GAP.sub(_gap, spaces.sub(" ", text)).strip()
    if "\u00a0" not in text:
        return text
    lines = _NO_BREAK_SPACES.sub(" ", text).replace("\u00a0", " ").split("\n")
    return "\n".join(line.rstrip(" ") for line in lines)


def _gap(match: re.Match[str]) -> str:
    """What stands between two pieces of text that marks or line ends put apart."""
    marks = match[0]
    if _CELL in marks and not any(mark in marks for mark in (_LINE, _ROW, _BR)):
        return " |" * marks.count(_CELL) + " "
    empty_cells = ""  # at the beginning of a row
    if _CELL in marks and _ROW in marks:
        empty_cells = "| " * marks[marks.rindex(_ROW) :].count(_CELL)
    if _NEXT_ROW.search(marks):
        return "\n" + empty_cells
    if empty_cells:
        return "\n\n" + empty_cells
    return "\n\n" if _PARAGRAPH in marks or marks.count(_BR) > 1 or marks.count("\n") > 1 else "\n"


def _verbatim(text: str) -> str:
    lines = _GAP_IN_PRE.sub("\n", text.replace("\r\n", "\n")).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")
