"""HTML to text: what a reader sees stays, in its layout; the page's chrome goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from selectolax.lexbor import LexborHTMLParser

from megatron_cpt.corpus.readers.html_nesting import MAX_DEPTH, limit_nesting
from megatron_cpt.corpus.readers.html_text import article_text, html_to_text

SPHINX = """<!DOCTYPE html><html lang="en"><head><title>csv</title><style>p{}</style></head><body>
<div class="related" role="navigation"><ul><li><a href="i.html">index</a></li></ul></div>
<div class="document"><div role="main"><section id="csv"><h1>csv<a class="headerlink" href="#csv">¶</a></h1>
<p>The module reads tables
   and writes them.</p>
<div class="highlight"><pre><span class="kn">import</span> <span class="nn">csv</span>
<span class="k">with</span> <span class="nb">open</span>(<span class="s1">'a.csv'</span>) as file:
    <span class="k">for</span> row <span class="ow">in</span> csv.reader(file):

        print(<span class="s1">', '</span>.join(row))
</pre></div>
<table><thead><tr><th>Option</th><th><p>Meaning</p></th></tr></thead>
<tbody><tr><td><p><code>-u</code></p></td><td><p>unbuffered</p></td></tr><tr><td>-v</td><td>verbose</td></tr></tbody></table>
</section></div></div><footer>© the authors</footer></body></html>"""
DOCBOOK = """<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" ""><html><body>
<div class="sect1"><h2>Aggregates</h2><div class="table"><table><tr><th>Function</th></tr><tr><td><p>
        <code>avg</code> ( <code>smallint</code> )
        → <code>numeric</code></p><p>The mean of all values.</p></td></tr></table></div>
<pre class="programlisting">SELECT city,
       max(temp_lo)
    FROM weather;</pre><p>Done.</p></div></body></html>"""


def test_cells_code_headings_and_controls_stay_apart_and_whole() -> None:
    page = """<html><body><article><header><h1>Loops</h1></header>
    <table><tr><th>Drug</th><th>Dose</th></tr><tr><td>aspirin</td><td>100 mg</td></tr></table>
    <pre>\ndef f(x):\n    for i in x:\n        print(i)\n</pre><textarea>a\n  b</textarea>
    <select><option>One</option><option>Two</option></select><button>Send</button>
    <p>H<sub>2</sub>O and 2<sup>10</sup>, see note<sup><a href="#1">1</a></sup></p></article></body></html>"""
    assert html_to_text(page) == (
        "Loops\n\nDrug | Dose\naspirin | 100 mg\n\ndef f(x):\n    for i in x:\n        print(i)"
        "\n\na\n  b\n\nOne\nTwo\n\nSend\n\nH2O and 2^10, see note1"
    )


def test_a_sphinx_page_keeps_its_code_and_tables_and_loses_its_navigation() -> None:
    assert html_to_text(SPHINX) == (
        "csv\n\nThe module reads tables and writes them.\n\nimport csv\nwith open('a.csv') as file:\n"
        "    for row in csv.reader(file):\n\n        print(', '.join(row))\n\n"
        "Option | Meaning\n-u | unbuffered\n-v | verbose"
    )


def test_a_docbook_page_keeps_its_code_and_tables() -> None:
    assert html_to_text(DOCBOOK) == (
        "Aggregates\n\nFunction\navg ( smallint ) → numeric\n\nThe mean of all values.\n\n"
        "SELECT city,\n       max(temp_lo)\n    FROM weather;\n\nDone."
    )


@pytest.mark.parametrize("chrome", ["header", "footer", "aside"])
def test_header_footer_and_aside_are_chrome_of_the_page_and_content_of_an_article(chrome: str) -> None:
    part = f"<{chrome}><p>part</p></{chrome}>"
    assert html_to_text(f"<body>{part}<p>text</p></body>") == "text"
    assert html_to_text(f"<body><main>{part}<p>text</p></main></body>") == "part\n\ntext"
    assert html_to_text(f"<body><article><div>{part}</div><p>text</p></article>{part}</body>") == "part\n\ntext"


def test_a_line_end_is_a_space_in_a_page_and_a_line_end_in_text_with_a_few_tags() -> None:
    assert html_to_text("<html><body><p>one\n  two</p>") == "one two"
    assert html_to_text("one <b>two</b>\nthree\n\n\nfour") == "one two\nthree\n\nfour"


def test_marks_within_the_page_are_no_layout() -> None:
    assert html_to_text("<p>a\ufdd0b&#xFDD4;c&#64982;d</p>") == "a b ;c ;d"


def test_empty_cells_keep_their_place_and_cells_of_blocks_become_lines() -> None:
    assert html_to_text("<table><tr><td>a</td><td></td><td>b</td></tr></table>") == "a | | b"
    assert html_to_text("<table><tr><td><div>a</div></td><td><ul><li>b</ul></td></tr></table>") == "a\n\nb"


def test_nesting_beyond_the_limit_loses_tags_and_no_text() -> None:
    deep = "".join(f"<div>{n}" for n in range(3 * MAX_DEPTH)) + "<p>end"
    assert html_to_text(deep).split() == [str(n) for n in range(3 * MAX_DEPTH)] + ["end"]
    bold = "".join(f"<b id={n}>{n} " for n in range(100)) + "<p>x" * 10
    assert html_to_text(bold).split() == [str(n) for n in range(100)] + ["x"] * 10
    many = "<p " + " ".join(f"a{n}=1" for n in range(1000)) + ">text</p>"
    assert limit_nesting(many) == "<p>text</p>"
    assert limit_nesting(SPHINX) == SPHINX


def test_the_article_alone_is_found_by_resiliparse() -> None:
    pytest.importorskip("resiliparse")
    prose = "".join(f"<p>Paragraph {n} tells of the spring and of the rivers that swell with it.</p>" for n in range(9))
    page = (
        f"<html><body><ul class='menu'><li><a href='/'>Home</a></li></ul><article><h1>Rivers</h1>{prose}</article>"
        "<div class='sidebar'><a href='/x'>Buy now</a></div></body></html>"
    )
    text = article_text(page)
    assert "Rivers" in text and "Paragraph 8" in text
    assert "Home" not in text and "Buy now" not in text


INSTALLED = sorted(
    page
    for pattern in ("postgresql-doc-*/html", "python3*/html/library", "python3*/html/tutorial")
    for folder in Path("/usr/share/doc").glob(pattern)
    for page in folder.glob("*.html")
)


@pytest.mark.skipif(not INSTALLED, reason="Debian's postgresql-doc or python3-doc is not installed")
def test_every_cell_and_every_line_of_code_of_debians_documentation_is_in_the_text() -> None:
    cells = lines = 0
    for page in INSTALLED[::7]:
        html = page.read_text(errors="replace")
        text = html_to_text(html)
        flat, written = re.sub(r"[\s|^]+", "", text), {line.rstrip() for line in text.split("\n")}
        tree = LexborHTMLParser(html)
        for node in tree.css("td, th"):
            cells += 1
            assert re.sub(r"[\s|^¶]+", "", node.text(deep=True)) in flat, page
        for node in tree.css("pre"):
            for line in filter(str.strip, node.text(deep=True).split("\n")):
                lines += 1
                assert line.rstrip() in written, (page, line)
    assert cells and lines
