"""The shipped corpora: their descriptions are valid and run on text of their kind."""

from __future__ import annotations

import json
import random
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from selectolax.lexbor import LexborHTMLParser

from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.readers.html_article import article_text
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import load_corpus
from megatron_cpt.errors import DataError
from tests import apt
from tests.unit.corpus.dedup.test_dedup import decoded
from tests.unit.corpus.filters.test_filters import GOOD

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*/corpus.yaml"))


def texts_for(name: str) -> list[str]:
    if name == "code":
        folder = Path(sysconfig.get_paths()["stdlib"])
        return [(folder / f"{module}.py").read_text() for module in ("abc", "bisect", "heapq", "queue", "types")] * 2
    if name == "chinese":
        law = (
            "第{}条　为了保护当事人的合法权益，维护社会经济秩序，根据宪法，制定本法。任何组织和个人不得侵犯第{}类权利。"
        )
        return ["\n".join(law.format(i * j, j) for j in range(1, 30)) for i in range(1, 40)]
    rng, words = random.Random(0), sorted(set(GOOD.replace(".", "").lower().split()))
    return [" ".join(word for _ in range(60) for word in rng.sample(words, 2)) + "." for _ in range(60)]


def test_all_five_are_here() -> None:
    assert {path.parent.name for path in EXAMPLES} >= {"medical", "code", "chinese", "general", "technical"}


def test_the_technical_example_reads_pages_with_their_tables_and_code(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = load_corpus(EXAMPLES[0].parents[1] / "technical" / "corpus.yaml")
    body = "<p>{}</p><table><tr><td>option_{}</td><td>integer</td></tr></table><pre>def f(x):\n    return x</pre>"
    for source in corpus.sources:
        assert source.files == (f"data/technical/html/{source.name}",)
        folder = tmp_path / source.name
        folder.mkdir()
        for number, text in enumerate(texts_for(source.name)[:20]):
            (folder / f"{number}.html").write_text(f"<html><body>{body.format(text, source.name)}</body></html>")
    sources = [source.model_copy(update={"files": (str(tmp_path / source.name),)}) for source in corpus.sources]
    changes = {
        "output_prefix": str(tmp_path / "set"),
        "tokenizer": str(tokenizer_dir),
        "sources": tuple(sources),
        "split": {},
        "dedup": None,
    }
    outcome = preprocess(corpus.model_copy(update=changes), workers=1)
    (manifest,) = outcome.datasets.values()
    assert manifest.document_count == 40
    texts = decoded(str(tmp_path / "set"), tokenizer_dir)
    assert sum("option_postgresql | integer\n\ndef f(x):\n    return x" in text for text in texts) == 20


@pytest.fixture(scope="module")
def debian_pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A sample of the pages that the technical example is made of, by its own script."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parents[1]))
    from prepare_corpus import technical_pages

    folder = tmp_path_factory.mktemp("technical")
    try:
        pages = technical_pages(folder)
    except DataError:
        apt.update()
        try:
            pages = technical_pages(folder)
        except DataError as error:
            pytest.skip(f"no documentation packages: {error}")
    finally:
        monkeypatch.undo()
    found = sorted(folder.rglob("*.html"))
    assert len(found) == pages > 1000
    return found[::20]


@pytest.mark.parametrize("extract", [html_to_text, article_text], ids=["whole", "article"])
def test_cells_and_lines_of_code_of_debians_documentation_are_in_the_text(
    debian_pages: list[Path], extract: Callable[[str], str]
) -> None:
    if extract is article_text:
        pytest.importorskip("resiliparse")
    cells, lines = [], []
    for page in debian_pages:
        html = page.read_text(errors="replace")
        text = extract(html)
        flat, written = re.sub(r"[\s|^]+", "", text), {line.rstrip() for line in text.split("\n")}
        tree = LexborHTMLParser(html)
        cells += [re.sub(r"[\s|^¶]+", "", node.text(deep=True)) in flat for node in tree.css("td, th")]
        code = [line for node in tree.css("pre") for line in node.text(deep=True).split("\n") if line.strip()]
        lines += [line.rstrip() in written for line in code]
    assert len(cells) > 500 and len(lines) > 1000
    if extract is html_to_text:
        assert all(cells) and all(lines)
    else:  # which parts are the article is a guess, and wrong for some; no more of them than was measured
        assert sum(cells) > 0.97 * len(cells) and sum(lines) > 0.97 * len(lines)


def test_the_technical_example_runs_on_pages_of_debian(
    debian_pages: list[Path], tmp_path: Path, tokenizer_dir: Path
) -> None:
    corpus = load_corpus(EXAMPLES[0].parents[1] / "technical" / "corpus.yaml")
    for page in debian_pages:
        name = "postgresql" if "postgresql" in page.parts else "python"
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(page, tmp_path / name / f"{page.parent.name}-{page.name}")
    sources = tuple(source.model_copy(update={"files": (str(tmp_path / source.name),)}) for source in corpus.sources)
    changes = {"output_prefix": str(tmp_path / "set"), "tokenizer": str(tokenizer_dir), "sources": sources}
    outcome = preprocess(corpus.model_copy(update=changes), workers=1)
    kept = sum(manifest.document_count for manifest in outcome.datasets.values())
    assert kept > 0.9 * len(debian_pages) and kept + sum(outcome.rejects.values()) == len(debian_pages)
    assert all(verify_dataset(prefix).ok for prefix in outcome.datasets)


WITH_RAW_TEXT = [path for path in EXAMPLES if path.parent.name != "technical"]


@pytest.mark.parametrize("path", WITH_RAW_TEXT, ids=lambda path: path.parent.name)
def test_example_runs(path: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = load_corpus(path)
    raw = tmp_path / "raw.jsonl"
    rows = [{"id": i, "text": text} for i, text in enumerate(texts_for(path.parent.name))]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpus.sources[0].files == (f"data/{path.parent.name}/raw.jsonl",)
    changes = {
        "output_prefix": str(tmp_path / "set"),
        "tokenizer": str(tokenizer_dir),
        "sources": (corpus.sources[0].model_copy(update={"files": (str(raw),)}),),
        "split": {"train": 0.5, "valid": 0.5},
    }
    outcome = preprocess(corpus.model_copy(update=changes), workers=1)
    kept = sum(manifest.document_count for manifest in outcome.datasets.values())
    assert kept >= 5 and kept + sum(outcome.rejects.values()) == len(rows)
    assert all(verify_dataset(prefix).ok for prefix in outcome.datasets)
