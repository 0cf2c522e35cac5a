"""The report of a corpus in a real browser: nothing is cut off on a phone, and it can be read in the dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import parse_corpus
from tests.unit.corpus.conftest import build_tokenizer
from tests.unit.corpus.dedup.test_dedup import document
from tests.web.conftest import PICTURES, Watched

HOSTILE = [
    "x" * 3000,
    "short",
    "\u0627\u0644\u0633\u0644\u0627\u0645 " * 40,
    "<script>alert(1)</script>" * 20,
    "\u202e evil " * 30,
]
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Text that is wider than its place, where that does not scroll.
CUT = """() => [...document.querySelectorAll("h1, h2, p, summary, td:first-child, .numbers div, pre")]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))"""
CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const page = light(getComputedStyle(document.body).backgroundColor);
    return Math.min(...[...document.querySelectorAll("td, th, p, summary, h1")].map(e => {
        const text = light(getComputedStyle(e).color);
        return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05) })) }"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names without a break, hostile texts, many sources, every section."""
    folder = tmp_path_factory.mktemp("report")
    sources = []
    names = ["a", "a_very_long_source_name_without_any_break" * 3, "\u0645\u062a\u0646 <b>", "zero", "four", "five"]
    for number, name in enumerate(names):
        texts = [document(100 * number + i) for i in range(40)] * 2 if name != "zero" else [""]
        texts += HOSTILE if name == "a" else []
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "files": str(file)})
    raw = {
        "output_prefix": str(folder / ("prefix_without_any_break" * 5)),
        "tokenizer": str(build_tokenizer(folder / "tokenizer")),
        "sources": sources,
        "filters": {"min_chars": 30, "gopher_repetition": True},
        "dedup": {"near": True},
        "split": {"train": 0.9, "valid": 0.1},
        "train_tokens": 100_000_000,
    }
    preprocess(parse_corpus(raw, "test"), workers=1)
    return Path(f"{raw['output_prefix']}.report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_and_can_be_read(browser: Browser, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    watched = Watched(page, "file://")
    page.goto(report.as_uri())
    for state in ("false", "true"):
        page.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {state})")
        assert page.evaluate(OVERFLOW) == 0
        assert page.evaluate(CUT) == []
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, AA
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.screenshot(path=PICTURES / f"corpus-report-{width}-{scheme}.png", full_page=True)
    assert watched.wrong == []
    page.close()
