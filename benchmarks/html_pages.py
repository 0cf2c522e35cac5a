"""What HTML extraction keeps of documentation, and how fast: the pages of Debian's PostgreSQL and Python manuals.

    python examples/prepare_corpus.py technical
    python benchmarks/html_pages.py data/technical/html

Every table cell (td, th) and every line of code (in pre) of every page is looked for in the text, as the parser found
it; for `clean: {html: true}` and for `clean: {html: article}`. The peers are resiliparse's own text of the main
content, and trafilatura where it is installed (`pip install trafilatura lxml_html_clean`; no dependency of ours):
same pages, same count. Time is CPU-seconds of one process.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser

from megatron_cpt.corpus.readers.html_article import article_text
from megatron_cpt.corpus.readers.html_text import html_to_text

# White space, and what our layout adds: a cell is looked for as its other characters, in their order.
_NOT_COMPARED = re.compile(r"[\s|^¶]+")


@dataclass
class Kept:
    """Cells and lines of code that some pages have, and how many of them their texts lack."""

    cells: int = 0
    lines: int = 0
    lost_cells: int = 0
    lost_lines: int = 0

    def count(self, html: str, text: str) -> None:
        """Look for the cells and lines of one page in its text."""
        flat, written = _NOT_COMPARED.sub("", text), {line.rstrip() for line in text.split("\n")}
        tree = LexborHTMLParser(html)
        for node in tree.css("td, th"):
            self.cells += 1
            self.lost_cells += _NOT_COMPARED.sub("", node.text(deep=True)) not in flat
        for node in tree.css("pre"):
            lines = [line.rstrip() for line in node.text(deep=True).split("\n") if line.strip()]
            self.lines += len(lines)
            self.lost_lines += sum(line not in written for line in lines)


def extractors() -> dict[str, Callable[[str], str]]:
    """The ways to get text out of a page, by name."""
    from resiliparse.extract.html2text import extract_plain_text

    found: dict[str, Callable[[str], str]] = {
        "`html: true`": html_to_text,
        "`html: article`": article_text,
        "resiliparse's main content": lambda html: extract_plain_text(html, main_content=True),
    }
    if importlib.util.find_spec("trafilatura"):
        from trafilatura import extract  # type: ignore[import-not-found, unused-ignore]

        found["trafilatura"] = lambda html: extract(html, include_comments=False) or ""
    return found


def main(folder: Path) -> None:
    pages = [page.read_text(errors="replace") for page in sorted(folder.rglob("*.html"))]
    megabytes = sum(map(len, pages)) / 1e6
    print(f"{len(pages):,} pages, {megabytes:.1f} MB\n")
    print("| extraction | cells | lost | lines of code | lost | text, MB | MB per CPU-second |")
    print("|---|---|---|---|---|---|---|")
    for name, extract in extractors().items():
        started = time.process_time()
        texts = [extract(page) for page in pages]
        seconds = time.process_time() - started
        kept = Kept()
        for page, text in zip(pages, texts, strict=True):
            kept.count(page, text)
        lost_cells = f"{kept.lost_cells:,} ({kept.lost_cells / kept.cells:.1%})"
        lost_lines = f"{kept.lost_lines:,} ({kept.lost_lines / kept.lines:.1%})"
        size, speed = f"{sum(map(len, texts)) / 1e6:.1f}", f"{megabytes / seconds:.1f}"
        print(f"| {name} | {kept.cells:,} | {lost_cells} | {kept.lines:,} | {lost_lines} | {size} | {speed} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
