"""Duplicates and contamination: found as by comparing everything with everything, the first stays, all is counted."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.dedup import duplicates as dedup
from megatron_cpt.corpus.dedup.duplicates import smallest_members
from megatron_cpt.corpus.dedup.signatures import SHINGLE_TOKENS, exact_keys, shingle_hashes, similarity
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.run.preprocess import dataset_prefixes, preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import ConfigError, DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl

WORDS = [f"{a}{b}" for a in ("car", "lum", "tis", "nor", "pel", "vas") for b in ("dio", "ter", "ma", "xin", "ol", "e")]


def document(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def edited(text: str, seed: int, share: float) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=6))
def test_shingles_equal_plain_sets(documents: list[list[int]]) -> None:
    ids = np.array([i for d in documents for i in d], np.int32)
    hashes, offsets = shingle_hashes(ids, np.array([len(d) for d in documents]))
    of_shingle: dict[tuple[int, ...], int] = {}
    for index, doc in enumerate(documents):
        plain = (
            [tuple(doc[i : i + SHINGLE_TOKENS]) for i in range(max(1, len(doc) - SHINGLE_TOKENS + 1))] if doc else []
        )
        mine = hashes[offsets[index] : offsets[index + 1]].tolist()
        assert len(mine) == len(plain)
        for shingle, value in zip(plain, mine, strict=True):
            assert of_shingle.setdefault(shingle, value) == value
    assert len(set(of_shingle.values())) == len(of_shingle)


def test_similarity_is_the_jaccard_index() -> None:
    assert similarity(np.arange(50), np.arange(50)) == 1.0
    assert similarity(np.arange(50), np.arange(100, 150)) == 0.0
    assert similarity(np.arange(50), np.arange(100)) == pytest.approx(46 / 96)


def test_exact_keys_ignore_case_and_white_space_only() -> None:
    keys = exact_keys(["A  b\nC", "a b c", "a bc", "a b c."])
    assert (keys[0] == keys[1]).all() and len({tuple(k) for k in keys.tolist()}) == 3


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 6_000)


def decoded(prefix: str, tokenizer_dir: Path) -> list[str]:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in open_indexed(prefix)]


@pytest.mark.usefixtures("small_units")
def test_exact_duplicates_go_and_the_first_stays(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    texts = [document(i) for i in range(60)]
    rows = texts + [t.upper() if i % 2 else t for i, t in enumerate(texts[:20])] + texts[50:]
    random.Random(1).shuffle(rows)
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", rows), dedup=True)
    assert len(sources.plan_units(corpus)) > 5
    outcome = preprocess(corpus, workers=2)
    seen: set[str] = set()
    expected = [row for row in rows if not (row.lower() in seen or seen.add(row.lower()))]
    assert decoded(corpus.output_prefix, tokenizer_dir) == expected and len(expected) == 60
    assert outcome.rejects == {"duplicate_exact": 30}
    assert outcome.documents_read == len(rows) == outcome.datasets[corpus.output_prefix].document_count + 30
    clusters = [json.loads(line) for line in Path(f"{corpus.output_prefix}.duplicates.jsonl").read_text().splitlines()]
    for cluster in clusters:
        kept = rows[cluster["kept"]["line"] - 1]
        assert all(rows[member["line"] - 1].lower() == kept.lower() for member in cluster["dropped"])
    assert sum(len(cluster["dropped"]) for cluster in clusters) == 30
    assert verify_dataset(corpus.output_prefix, str(tokenizer_dir)).ok


@pytest.mark.usefixtures("small_units")
def test_near_duplicates_equal_comparing_all_pairs(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    texts = [document(i) for i in range(40)]
    texts += [edited(text, i, 0.03) for i, text in enumerate(texts[:15])]
    texts += [edited(text, i, 0.5) for i, text in enumerate(texts[15:30])]
    random.Random(2).shuffle(texts)
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", texts), dedup={"near": {"similarity": 0.6}})
    outcome = preprocess(corpus, workers=2)
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = [np.array([*tokenizer.encode_batch([t])[0], tokenizer.eod_id]) for t in texts]
    kept: list[int] = []
    for i in range(len(texts)):
        if all(similarity(ids[i], ids[j]) < 0.6 for j in kept):
            kept.append(i)
    assert decoded(corpus.output_prefix, tokenizer_dir) == [texts[i] for i in kept]
    assert 8 < outcome.rejects["duplicate_near"] < 20


@pytest.mark.usefixtures("small_units")
def test_result_does_not_depend_on_workers_or_buckets(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [edited(document(i % 25), i, 0.02 * (i % 4)) for i in range(120)]
    corpus = make_corpus(
        write_jsonl(tmp_path / "a.jsonl", texts), dedup={"near": True}, split={"train": 0.8, "valid": 0.2}
    )
    seen = []
    for workers, bucket in ((1, 1 << 22), (3, 1 << 22), (2, 13)):
        monkeypatch.setattr(dedup, "DOCUMENTS_PER_BUCKET", bucket)
        outcome = preprocess(corpus, workers=workers, overwrite=True)
        files = [path(p).read_bytes() for p in dataset_prefixes(corpus).values() for path in (bin_path, idx_path)]
        seen.append((files, outcome.rejects))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1]["duplicate_near"] > 30


def test_pairs_whose_verdicts_share_a_place_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "VERDICTS_KEPT", 2)
    verdicts = dedup._Verdicts()
    verdicts.forget()
    told: dict[int, tuple[int, int, bool]] = {}
    for a, b in itertools.product((1, 7, 3 << 32 | 5, (1 << 31) << 32 | 9), (0, 2, 1 << 32)):
        place = verdicts.place(a, b)
        expected = told[place][2] if told.get(place, (0, 0, False))[:2] == (a, b) else None
        assert verdicts.get(place, a, b) is expected
        told[place] = a, b, a % 2 == 1
        verdicts.put(place, a, b, a % 2 == 1)
        assert verdicts.get(place, a, b) is (a % 2 == 1)
    assert len(told) == 2


def test_across_sources_ids_and_sidecar(tmp_path: Path, make_corpus: Any) -> None:
    rows = [{"id": i, "text": document(i)} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": 3, "text": document(100)}, {"id": 50, "text": document(4)}, {"text": document(101)}, {"text": "x y"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = [{"name": n, "files": str(tmp_path / f"{n}.jsonl"), "metadata": ["id"]} for n in "ab"]
    corpus = make_corpus(sources=described, dedup={"id_key": "id"})
    outcome = preprocess(corpus, workers=1)
    assert outcome.rejects == {"duplicate_id": 1, "duplicate_exact": 1}
    (manifest,) = outcome.datasets.values()
    assert [source.documents for source in manifest.sources] == [10, 2]
    kept = [json.loads(line) for line in Path(f"{corpus.output_prefix}.documents.jsonl").read_text().splitlines()]
    assert [(row["source"], row["line"]) for row in kept[10:]] == [("b", 3), ("b", 4)]
    with pytest.raises(ConfigError, match="not in metadata"):
        make_corpus(tmp_path / "a.jsonl", dedup={"id_key": "id"})


def test_documents_with_an_empty_id_are_no_duplicates_of_each_other(tmp_path: Path, make_corpus: Any) -> None:
    """An empty cell of a csv file is an id that is not there."""
    ids = ["7", "", " ", "", "7"]
    rows = "".join(f'{own},"{document(index)}"\n' for index, own in enumerate(ids))
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    corpus = make_corpus(tmp_path / "a.csv", source={"metadata": ["id"]}, dedup={"id_key": "id"})
    outcome = preprocess(corpus, workers=1)
    assert outcome.rejects == {"duplicate_id": 1} and outcome.documents_read == 5


def test_against_a_tokenised_dataset(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    old = make_corpus(
        write_jsonl(tmp_path / "old.jsonl", [document(i) for i in range(20)]), output_prefix=str(tmp_path / "old")
    )
    preprocess(old, workers=1)
    texts = [document(3), edited(document(4), 1, 0.02), document(99), document(99)]
    settings_ = {"near": True, "against": [old.output_prefix]}
    corpus = make_corpus(write_jsonl(tmp_path / "new.jsonl", texts), dedup=settings_)
    outcome = preprocess(corpus, workers=1)
    assert decoded(corpus.output_prefix, tokenizer_dir) == [document(99)]
    assert outcome.rejects == {"duplicate_of_reference": 2, "duplicate_exact": 1}
    other = build_tokenizer(tmp_path / "other", vocab_size=350)
    with pytest.raises(DataError, match="another tokenizer"):
        preprocess(corpus.model_copy(update={"tokenizer": str(other)}), workers=1, overwrite=True)


def test_decontamination(tmp_path: Path, make_corpus: Any, caplog: pytest.LogCaptureFixture) -> None:
    question = document(7, words=30)
    exam = tmp_path / "exam.jsonl"
    exam.write_text(
        json.dumps({"question": question, "answer": "yes"}) + '\n{"question": "short one", "answer": "no"}\n'
    )
    leaked = document(1) + " " + question.upper().replace(" ", ", ") + "! " + document(2)
    part = " ".join(question.split()[:12])  # one word less than an n-gram
    texts = [*TEXTS, leaked, document(3) + " " + part + " unlike", question]
    settings_ = {"files": [str(exam)], "text": "{question} {answer}"}
    outcome = preprocess(make_corpus(write_jsonl(tmp_path / "a.jsonl", texts), decontaminate=settings_), workers=1)
    assert outcome.rejects == {"contaminated": 2}
    assert "1 of 2 evaluation examples have fewer than 13 words" in caplog.text
    exam.write_text('{"question": "short one", "answer": "no"}\n')
    with pytest.raises(DataError, match="none of 1 evaluation examples"):
        preprocess(make_corpus(tmp_path / "a.jsonl", decontaminate=settings_), workers=1, overwrite=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_clusters_are_the_connected_components(case: tuple[int, list[tuple[int, int]]]) -> None:
    """Against the simplest way: spread the smallest member until nothing changes."""
    count, pairs = case
    label, changed = list(range(count)), True
    while changed:
        changed = False
        for a, b in pairs:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    assert smallest_members(count, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == label
    chain = np.stack((np.arange(1, count), np.arange(count - 1)), axis=1)
    assert not smallest_members(count, chain).any()
