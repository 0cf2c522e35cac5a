"""HTML to text: what a reader sees stays, in its layout; the page's chrome goes; a page is parsed once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.readers.html_article import article_text
from megatron_cpt.corpus.readers.html_nesting import MAX_DEPTH, limit_nesting
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import write_jsonl
from tests.unit.corpus.dedup.test_dedup import decoded

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
    assert html_to_text("<p>a\ufdd0b&#xFDD4;c&#64982;d\ufdef&#xfdeF;&#65007;</p>") == "a b ;c ;d ; ;"


def test_empty_cells_keep_their_place_and_cells_of_blocks_become_lines() -> None:
    assert html_to_text("<table><tr><td>a</td><td></td><td>b</td></tr></table>") == "a | | b"
    assert html_to_text("<table><tr><td><div>a</div></td><td><ul><li>b</ul></td></tr></table>") == "a\n\nb"


def test_empty_cells_at_the_beginning_of_a_row_keep_the_others_in_their_columns() -> None:
    rows = "<tr><th></th><th>dose</th></tr><tr><td></td>\n<td></td><td><p>x</p></td></tr>"
    assert html_to_text(f"<p>a</p><table>{rows}</table>b") == "a\n\n| dose\n| | x\n\nb"


def test_rows_cut_out_of_a_table_keep_their_cells_apart() -> None:
    assert html_to_text("<td>aspirin</td><td>100 mg</td>") == "aspirin | 100 mg"
    rows = "Doses: <tr><th>Drug<th>Dose<tr><td>aspirin<td class='n'>100 <b>mg</b><tr><td>x</td></tr>after"
    assert html_to_text(rows) == "Doses:\nDrug | Dose\naspirin | 100 mg\nx\nafter"


@pytest.mark.parametrize("tag", ["pre", "textarea", "listing", "xmp", "div style='color: red; white-space: pre-wrap'"])
def test_every_element_that_is_shown_as_it_stands_keeps_its_layout(tag: str) -> None:
    page = f"<html><body><p>a</p><{tag}>\n  if x:\n      y()\n</{tag.split()[0]}><p>b</p></body></html>"
    assert html_to_text(page) == "a\n\n  if x:\n      y()\n\nb"


def test_no_break_spaces_that_begin_a_line_are_indentation() -> None:
    code = "<code>for i in x:<br>&nbsp; &nbsp;&nbsp;print(i)<br>\n&nbsp;&nbsp;&nbsp;# a&nbsp; b&nbsp;<br>end</code>"
    assert html_to_text(f"<html><body>{code}</body></html>") == "for i in x:\n    print(i)\n   # a b\nend"


def test_a_header_with_the_only_title_of_a_page_stays_and_one_of_several_goes() -> None:
    header = "<header><nav>Home</nav><h1>The title</h1></header>"
    assert html_to_text(f"<body><div>{header}<p>text</p></div></body>") == "The title\n\ntext"
    assert html_to_text(f"<body>{header}<h1>Other</h1><p>text</p></body>") == "Other\n\ntext"


def test_nesting_beyond_the_limit_loses_tags_and_no_text() -> None:
    deep = "".join(f"<div>{n}" for n in range(3 * MAX_DEPTH)) + "<p>end"
    assert html_to_text(deep).split() == [str(n) for n in range(3 * MAX_DEPTH)] + ["end"]
    bold = "".join(f"<b id={n}>{n} " for n in range(100)) + "<p>x" * 10
    assert html_to_text(bold).split() == [str(n) for n in range(100)] + ["x"] * 10
    many = "<p " + " ".join(f"a{n}=1" for n in range(1000)) + ">text</p>"
    assert limit_nesting(many) == "<p>text</p>"
    assert limit_nesting(SPHINX) == SPHINX


PROSE = "".join(f"<p>Paragraph {n} tells of the spring and of the rivers that swell with it.</p>" for n in range(9))
MENU = "<ul class='menu'><li><a href='/'>Home</a></li></ul>"


def article_page(content: str) -> str:
    sidebar = "<div class='sidebar'><a href='/x'>Buy now</a></div>"
    return f"<html><body>{MENU}<article><h1>Rivers</h1>{PROSE}{content}</article>{sidebar}</body></html>"


def test_the_article_alone_is_found_by_resiliparse() -> None:
    pytest.importorskip("resiliparse")
    text = article_text(article_page(""))
    assert text.startswith("Rivers\n\nParagraph 0 tells") and text.endswith("swell with it.")
    assert text.count("Paragraph") == 9


def test_an_article_is_laid_out_as_a_page_is() -> None:
    pytest.importorskip("resiliparse")
    content = (
        "<p><code>B'10001' &lt;&lt; 3</code>\n  → <code>01000</code>, 2<sup>10</sup>\ufde1\ufddd</p>"
        "<ol><li>Code: <pre>    if x:\n        y()</pre></li></ol>"
        "<table><tr><td>aspirin</td><td>100 mg</td></tr></table>"
    )
    assert article_text(article_page(content)).endswith(
        "B'10001' << 3 → 01000, 2^10\n\nCode:\n\n    if x:\n        y()\n\naspirin | 100 mg"
    )


@pytest.mark.parametrize("mode", [False, True, "article"])
def test_a_page_is_parsed_once_so_that_tags_which_it_shows_stay(
    mode: bool | str, tmp_path: Path, make_corpus: Any, tokenizer_dir: Path
) -> None:
    if mode == "article":
        pytest.importorskip("resiliparse")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.html").write_text(article_page("<pre>&lt;b&gt;bold&lt;/b&gt; &amp;lt;</pre>"))
    (tmp_path / "in" / "b.md").write_text("A line of <b>Markdown</b>, which may hold HTML.")
    write_jsonl(tmp_path / "in" / "c.jsonl", [article_page("<p>from a key</p>")])
    corpus = make_corpus(tmp_path / "in", clean={"html": mode}, max_document_seconds=5)
    preprocess(corpus, workers=1)
    page, markdown, key = decoded(str(tmp_path / "out" / "set"), tokenizer_dir)
    assert page.endswith("swell with it.\n\n<b>bold</b> &lt;" + ("" if mode == "article" else "\n\nBuy now"))
    assert ("Home" in page) == (mode != "article")
    assert ("<b>" in markdown) == (not mode)
    assert ("<p>" in key, "Home" in key) == {False: (True, True), True: (False, True), "article": (False, False)}[mode]


def test_a_source_has_its_own_way_with_pages(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.html").write_text(article_page(""))
    corpus = make_corpus(tmp_path / "a.html", source={"clean": {"html": "article"}})
    preprocess(corpus, workers=1)
    (text,) = decoded(str(tmp_path / "out" / "set"), tokenizer_dir)
    assert "Paragraph 8" in text and "Home" not in text


@pytest.mark.parametrize("name", ["a.html", "a.jsonl"])
def test_article_without_its_package_is_one_error(
    name: str, tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    (tmp_path / "a.html").write_text(article_page(""))
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(DataError, match="needs the package resiliparse") as error:
        preprocess(make_corpus(tmp_path / name, clean={"html": "article"}), workers=1)
    assert "megatron-cpt[corpus]" in str(error.value.hint)
