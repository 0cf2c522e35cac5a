"""The shipped corpora: their descriptions are valid and run on text of their kind."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import pytest

from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import load_corpus
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
