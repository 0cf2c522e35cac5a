"""The main content of an HTML page: without menus, teasers, comments and other boilerplate.

Which parts these are is guessed by resiliparse (Bevendorff et al. 2018, Elastic ChatNoir), and it is only asked: each
piece of text gets a number, those that resiliparse leaves are kept, and html_text lays them out. In resiliparse's own
text `B'10001' << 3` and its result `01000`, two elements with an arrow between them, become `B'10001' << 301000`, and
the first line of code within a list is indented.
"""

from __future__ import annotations

import re

from megatron_cpt.corpus.readers.html_text import laid_out, parse_page
from megatron_cpt.errors import DataError

# A number is written in hexadecimal digits, between two marks; all are noncharacters that parse_page lets no page have.
_DIGITS = {ord(digit): chr(0xFDE0 + value) for value, digit in enumerate("0123456789abcdef")}
_START, _END = chr(0xFDDD), chr(0xFDDE)
_NUMBER = re.compile(f"{_START}([{chr(0xFDE0)}-{chr(0xFDEF)}]+){_END}")
# What follows a number, up to the next mark of any kind.
_NUMBERED_TEXT = re.compile(f"{_NUMBER.pattern}([^\ufdd0-\ufdde]*)")


def article_text(html: str) -> str:
    """Return the main content of a page in the form of `html_to_text`.

    Raises:
        DataError: resiliparse is missing.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ModuleNotFoundError as error:
        hint = "pip install 'megatron-cpt[corpus]'"
        raise DataError("clean.html: article needs the package resiliparse", hint=hint) from error

    tree = parse_page(html)
    if tree.body is None:
        return ""
    texts = [node for node in tree.body.traverse(include_text=True) if node.tag == "-text"]
    for number, node in enumerate(texts):
        if (node.text_content or "").strip():
            node.insert_before(f"{_START}{number:x}{_END}".translate(_DIGITS))
    page = tree.html or ""
    main = extract_plain_text(page, main_content=True, preserve_formatting=False, list_bullets=False, alt_texts=False)
    kept = set(_NUMBER.findall(main))
    return laid_out(tree, html, select=lambda text: _NUMBERED_TEXT.sub(lambda m: m[2] if m[1] in kept else "", text))
