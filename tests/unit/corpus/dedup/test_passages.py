"""Repeated lines and paragraphs: removed as a plain reading of the rule does it, however the run is cut or killed."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.commands.preprocess import outcome_text
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path, read_manifest
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.dedup import passage_stage
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.run.preprocess import dataset_prefixes, preprocess, preprocess_shard
from megatron_cpt.errors import ConfigError
from tests.unit.corpus.conftest import write_jsonl
from tests.unit.corpus.dedup.test_dedup import decoded, document

BOILERPLATE = [f"Subscribe to our {kind} newsletter today!" for kind in ("daily", "weekly", "monthly", "yearly")]


def page(seed: int, separator: str = "\n") -> str:
    """Own passages among boilerplate in changing case and spacing, short ones, and blank lines."""
    rng = random.Random(seed)
    passages = [document(1000 * seed + i, words=6) for i in range(4)]
    passages += [f" {rng.choice([str.upper, str.lower])(rng.choice(BOILERPLATE))}  " for _ in range(2)]
    passages += ["Yes.", passages[0]] + ([""] if separator == "\n" else [])
    rng.shuffle(passages)
    return separator.join(passages)


def plain(texts: list[str], unit: str, min_chars: int, min_documents: int) -> tuple[list[str], int, int, int]:
    """The rule with sets of strings: (documents that stay, passages, characters, documents removed)."""
    cut = [t.split("\n") if unit == "lines" else re.split(r"\n(?:[^\S\n]*\n)+", t) for t in texts]

    def normal(passage: str) -> str:
        return " ".join(passage.lower().split())

    in_documents: dict[str, int] = {}
    for passages in cut:
        for key in {normal(p) for p in passages}:
            in_documents[key] = in_documents.get(key, 0) + 1
    seen: set[str] = set()
    out, removed, chars, emptied = [], 0, 0, 0
    for text, passages in zip(texts, cut, strict=True):
        stay = []
        for passage in passages:
            key = normal(passage)
            if len(key) >= min_chars and in_documents[key] >= min_documents and key in seen:
                removed, chars = removed + 1, chars + len(passage)
            else:
                stay.append(passage)
            seen.add(key)
        if len(stay) == len(passages):
            out.append(text)
        elif any(len(normal(p)) >= min_chars for p in stay):
            joined = "\n".join(stay) if unit == "lines" else "\n\n".join(stay)
            out.append(re.sub(r"\n(?:[^\S\n]*\n)+", "\n\n", joined).strip("\n"))
        else:
            emptied += 1
    return out, removed, chars, emptied


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 6_000)


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    """Two sources; the second repeats whole documents and parts of the first."""
    first = [page(i) for i in range(60)]
    second = [first[3], first[4].upper(), first[5] + "\n" + document(77), *(page(i) for i in range(60, 100))]
    return [write_jsonl(tmp_path / "a.jsonl", first), write_jsonl(tmp_path / "b.jsonl", second)]


def described(pages: list[Path], corpus: Any, **passages: Any) -> Any:
    named = [{"name": path.stem, "files": str(path)} for path in pages]
    return corpus(sources=named, dedup={"exact": False, "passages": passages or True})


def texts_of(pages: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for path in pages for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(("unit", "min_documents"), [("lines", 2), ("lines", 30), ("paragraphs", 2)])
def test_removed_as_the_plain_rule_says(
    tmp_path: Path, pages: list[Path], make_corpus: Any, tokenizer_dir: Path, unit: str, min_documents: int
) -> None:
    if unit == "paragraphs":
        texts = [page(i, separator="\n \n\n") for i in range(110)] + [page(7, separator="\n\n")]
        pages = [write_jsonl(tmp_path / "p.jsonl", texts)]
    corpus = described(pages, make_corpus, unit=unit, min_documents=min_documents)
    assert len(sources.plan_units(corpus)) > 4
    outcome = preprocess(corpus, workers=2)
    expected, removed, chars, emptied = plain(texts_of(pages), unit, 20, min_documents)
    assert decoded(corpus.output_prefix, tokenizer_dir) == expected
    assert outcome.rejects == ({"repeated_passages": emptied} if emptied else {})
    manifest = read_manifest(corpus.output_prefix)
    assert (manifest.config["passages_removed"], manifest.config["passage_chars_removed"]) == (removed, chars)
    assert f"removed within documents: {removed:,} ({chars:,} characters)" in outcome_text(outcome)
    assert removed > 50 and outcome.documents_read == len(expected) + emptied
    assert (emptied >= 1) == (min_documents == 2)
    text = Path(f"{corpus.output_prefix}.report.html").read_text()
    assert "Repeated passages removed" in text and "newsletter" in text
    assert verify_dataset(corpus.output_prefix, str(tokenizer_dir)).ok


def dataset_bytes(corpus: Any) -> list[bytes]:
    paths = [path(p) for p in dataset_prefixes(corpus).values() for path in (bin_path, idx_path, manifest_path)]
    return [path.read_bytes() for path in paths]


@pytest.mark.usefixtures("small_units")
def test_same_files_for_any_workers_runs_and_ranges(
    pages: list[Path], make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = described(pages, make_corpus)
    seen = []
    for workers, run, bucket in ((1, 1 << 20, 1 << 20), (3, 1 << 20, 50), (2, 1, 7)):
        monkeypatch.setattr(passage_stage, "BATCH_KEYS", run)
        monkeypatch.setattr(passage_stage, "KEYS_PER_BUCKET", bucket)
        preprocess(corpus, workers=workers, overwrite=True)
        seen.append(dataset_bytes(corpus))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.usefixtures("small_units")
def test_a_unit_of_several_runs_counts_each_document_once(
    tmp_path: Path, make_corpus: Any, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compressed unit in many batches, a run for each: the same line in all of them."""
    import gzip

    from megatron_cpt.corpus.readers import jsonl as readers

    monkeypatch.setattr(passage_stage, "BATCH_KEYS", 1)
    monkeypatch.setattr(readers, "BATCH_BYTES", 500)
    texts = [page(i) for i in range(40)]
    plain_file = write_jsonl(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain_file.read_bytes()))
    corpus = described([packed], make_corpus, min_documents=10)
    assert len(sources.plan_units(corpus)) == 1
    preprocess(corpus, workers=1)
    assert decoded(corpus.output_prefix, tokenizer_dir) == plain(texts, "lines", 20, 10)[0]


@pytest.mark.usefixtures("small_units")
def test_shards_twice_then_joined(pages: list[Path], make_corpus: Any, caplog: pytest.LogCaptureFixture) -> None:
    corpus = described(pages, make_corpus)
    preprocess(corpus, workers=1)
    expected = dataset_bytes(corpus)
    other = corpus.model_copy(update={"output_prefix": f"{corpus.output_prefix}2"})
    staging = Path(f"{other.output_prefix}.partial")
    units = len(sources.plan_units(corpus))
    with caplog.at_level("INFO"):
        preprocess_shard(other, 0, 2, workers=1)
    assert "shards are still at work" in caplog.text and not list(staging.glob("??????.json"))
    preprocess_shard(other, 1, 2, workers=1)
    assert len(list(staging.glob("??????.cleaned.json"))) == units
    assert len(list(staging.glob("??????.json"))) == units // 2
    preprocess_shard(other, 0, 2, workers=1)
    assert len(list(staging.glob("??????.json"))) == units and not list(staging.glob("*.cleaned.jsonl"))
    preprocess(other, workers=1)
    manifest = json.loads(dataset_bytes(other)[2]) | {"config": None}
    assert dataset_bytes(other)[:2] == expected[:2]
    assert manifest == json.loads(expected[2]) | {"config": None}


AFTER_THE_UNITS = -1  # the call after one per unit
RUN_AND_DIE = """
import os, signal, sys
from megatron_cpt.corpus.dedup import passage_stage
from megatron_cpt.corpus.run import unit as pipeline
from megatron_cpt.corpus.run import preprocess
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.schema import load_corpus
sources.MIN_UNIT_BYTES = 6000
passage_stage.KEYS_PER_BUCKET = 50
module, name, count = {"stage": passage_stage, "pipeline": pipeline}[sys.argv[2]], sys.argv[3], int(sys.argv[4])
original, calls = getattr(module, name), []
def wrapped(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, name, wrapped)
preprocess.preprocess(load_corpus(sys.argv[1]), workers=1)
"""


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("stage", "_replace", 3), ("stage", "save_array", 4), ("stage", "save_array", 20),
        ("stage", "_replace", AFTER_THE_UNITS),
        ("pipeline", "commit_unit", 2), ("pipeline", "forget_cleaned", 3),
    ],
)  # fmt: skip
def test_killed_in_any_stage_the_same_command_finishes_with_the_same_files(
    tmp_path: Path, pages: list[Path], make_corpus: Any, monkeypatch: pytest.MonkeyPatch,
    module: str, name: str, count: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(passage_stage, "KEYS_PER_BUCKET", 50)
    corpus = described(pages, make_corpus)
    count = len(sources.plan_units(corpus)) + 1 if count == AFTER_THE_UNITS else count
    preprocess(corpus, workers=1)
    expected = dataset_bytes(corpus)
    for path in (bin_path, idx_path, manifest_path):
        path(corpus.output_prefix).unlink()
    description = tmp_path / "corpus.yaml"
    description.write_text(json.dumps(corpus.model_dump(mode="json")))
    run = subprocess.run(
        [sys.executable, "-c", RUN_AND_DIE, str(description), module, name, str(count)], capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert Path(f"{corpus.output_prefix}.partial").exists() and not manifest_path(corpus.output_prefix).exists()
    preprocess(corpus, workers=2)
    assert dataset_bytes(corpus) == expected
    assert not Path(f"{corpus.output_prefix}.partial").exists()


def test_filters_come_first_and_rejects_keep_their_places(
    tmp_path: Path, make_corpus: Any, tokenizer_dir: Path
) -> None:
    """A document that a filter drops gives no first occurrence; what is dropped for repeats is listed with its line."""
    shared = "This sentence stands in every document here."
    texts = ["short " + shared, f"{document(1)}\n{shared}", f"{document(2)}\n{shared}", shared, f"{document(1)}\nYes."]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = make_corpus(file, filters={"custom": [f"{__name__}:is_wanted"]}, dedup={"passages": True})
    outcome = preprocess(corpus, workers=1)
    assert decoded(corpus.output_prefix, tokenizer_dir) == [texts[1], document(2)]
    assert outcome.rejects == {"repeated_passages": 2, f"custom:{__name__}:is_wanted": 1}
    assert outcome.rejects_file is not None
    listed = [json.loads(line) for line in Path(outcome.rejects_file).read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed if r["reason"] == "repeated_passages"] == [
        (4, "repeated_passages"),
        (5, "repeated_passages"),
    ]


def is_wanted(text: str) -> bool:
    return not text.startswith("short")


def test_settings_that_do_nothing_are_refused(tmp_path: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["a"])
    for dedup in (
        {"exact": False},
        {"exact": False, "passages": True, "against": ["x"]},
        {"passages": {"unit": "words"}},
    ):
        with pytest.raises(ConfigError, match="dedup"):
            make_corpus(file, dedup=dedup)
