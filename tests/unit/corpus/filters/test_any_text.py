"""Any text through the filters that judge by a model or by other documents: kept or counted, never lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.decontamination import _PUNCTUATION, Decontaminator
from megatron_cpt.corpus.filters.language import language_identifier, language_step, model_file
from megatron_cpt.corpus.filters.perplexity import PerplexityCeiling
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import parse_corpus
from megatron_cpt.corpus.schema_processing import Language, Perplexity
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl
from tests.unit.corpus.filters.test_filters import plain_words
from tests.unit.corpus.filters.test_perplexity import MAX_TOKENS, write_model

FAST = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.sampled_from(["", " ", "\0", "\u2028\u2029", "1" * 3000, "\U0010ffff", "İstanbul İ", "中文 中文 中文", *TEXTS]),
)

# Of few words, so that two texts share some in a row.
_words = st.one_of(
    _any_text,
    st.lists(st.sampled_from(["a", "B,", "c-d", "é", "İ", "中文", "\u2028", "\0", "_"]), max_size=20).map(" ".join),
)


def batch_of(texts: list[str]) -> Batch:
    return Batch("f", texts, list(range(1, len(texts) + 1)))


@pytest.mark.parametrize("keep", [[], ["EN"], ["english"], ["en", "zh-CN"], [""]])
def test_what_is_no_language_code_is_refused_and_would_drop_everything(keep: list[str]) -> None:
    with pytest.raises(ValidationError, match=r"keep"):
        Language.model_validate({"keep": keep})
    assert Language.model_validate({"keep": ["eng_Latn"], "model": "glotlid.bin"}).keep == ("eng_Latn",)


@FAST
@given(texts=st.lists(_any_text, max_size=8), least=st.floats(0, 1))
def test_every_text_has_a_language_and_is_kept_or_counted(texts: list[str], least: float) -> None:
    pytest.importorskip("fasttext")
    rule = Language(keep=("en", "zh"), min_score=least)
    identify, tally = language_identifier(model_file(rule)), UnitTally()
    kept = language_step(rule)(batch_of(texts), tally)
    assert kept.texts == [t for t in texts if identify(t)[0] in rule.keep and identify(t)[1] >= least]
    assert sum(tally.languages.values()) == len(texts) == len(kept) + tally.counts["language"]


@FAST
@given(exam=st.lists(_words, min_size=1, max_size=3), texts=st.lists(_words, max_size=6), n=st.integers(5, 7))
def test_any_texts_are_contaminated_as_plain_comparison_says(
    tmp_path: Path, exam: list[str], texts: list[str], n: int
) -> None:
    def ngrams(text: str) -> set[tuple[str, ...]]:
        words = plain_words(_PUNCTUATION.sub(" ", text.lower()))
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    rule = {"files": [str(write_jsonl(tmp_path / "exam.jsonl", exam))], "ngram_words": n, "min_matches": 1}
    raw = {"output_prefix": "x", "tokenizer": "x", "sources": [{"files": "x"}], "decontaminate": rule}
    corpus = parse_corpus(raw, "test")
    assert corpus.decontaminate is not None
    known = set().union(*map(ngrams, exam))
    if not known:
        with pytest.raises(DataError, match="evaluation examples has"):
            Decontaminator(corpus.decontaminate, corpus)
        return
    tally = UnitTally()
    kept = Decontaminator(corpus.decontaminate, corpus)(batch_of(texts), tally)
    assert kept.texts == [text for text in texts if not ngrams(text) & known]
    assert tally.counts["contaminated"] == len(texts) - len(kept)


def test_an_evaluation_set_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text('{"question": "what"}\n')
    rule = {"files": [str(tmp_path / "exam.jsonl")]}
    raw = {"output_prefix": "x", "tokenizer": "x", "sources": [{"files": "x"}], "decontaminate": rule}
    corpus = parse_corpus(raw, "test")
    assert corpus.decontaminate is not None
    with pytest.raises(DataError, match=r"1 of 1 .* \(1 missing_key\), the first in .*exam.jsonl:1") as caught:
        Decontaminator(corpus.decontaminate, corpus)
    assert "decontaminate.text" in str(caught.value.hint)


@pytest.fixture(scope="module")
def ceiling(tmp_path_factory: pytest.TempPathFactory) -> PerplexityCeiling:
    folder = write_model(tmp_path_factory.mktemp("any") / "model", seed=0)
    return PerplexityCeiling(Perplexity(model=str(folder), max_perplexity=500, max_tokens=MAX_TOKENS))


@settings(FAST, max_examples=25)
@given(texts=st.lists(_any_text, max_size=6))
def test_every_text_is_scored_alone_and_kept_or_counted(ceiling: PerplexityCeiling, texts: list[str]) -> None:
    tally = UnitTally()
    kept = ceiling(batch_of(texts), tally)
    assert len(kept) + tally.counts["perplexity"] == len(texts)
    assert kept.texts == [text for text in texts if len(ceiling(batch_of([text]), UnitTally()))]
    for reject in tally.rejects:
        value = float(reject.detail.split(",")[0])
        assert math.isfinite(value) and value >= 500


def model_damage(folder: Path, kind: str) -> None:
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    if kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "weights empty":
        weights.write_bytes(b"")
    elif kind == "no tokenizer":
        tokenizer.write_text('{"model": 5}')
    elif kind == "tokenizer of a larger model":
        _add_tokens(tokenizer, 200)
    elif kind == "positions no number":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": "x"'))


def _add_tokens(tokenizer: Path, count: int) -> None:
    from tokenizers import Tokenizer

    larger = Tokenizer.from_file(str(tokenizer))
    larger.add_tokens([f"<extra {i}>" for i in range(count)])
    larger.save(str(tokenizer))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights cut", "transformers cannot open"),
        ("weights empty", "transformers cannot open"),
        ("no tokenizer", "is not a tokenizer"),
        ("tokenizer of a larger model", "the model 512 rows"),
        ("positions no number", "is damaged"),
    ],
)
def test_a_damaged_model_is_one_clear_error(tmp_path: Path, make_corpus: Any, kind: str, message: str) -> None:
    folder = write_model(tmp_path / "model", seed=0)
    model_damage(folder, kind)
    rule = {"model": str(folder), "max_perplexity": 100, "max_tokens": MAX_TOKENS}
    with pytest.raises(DataError, match=message) as caught:
        preprocess(make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), filters={"perplexity": rule}), workers=1)
    assert caught.value.hint and not list((tmp_path / "out").glob("set.[bi]*"))


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_language_model_that_is_cut_short_is_one_clear_error(tmp_path: Path, make_corpus: Any, size: int) -> None:
    """The library dies of some: with 20 bytes it divides by zero."""
    pytest.importorskip("fasttext")
    whole = model_file(Language(keep=("en",))).read_bytes()
    (tmp_path / "m.ftz").write_bytes(whole[:size])
    rule = {"language": {"keep": ["en"], "model": str(tmp_path / "m.ftz")}}
    with pytest.raises(DataError, match=r"m\.ftz is not a fastText model") as caught:
        preprocess(make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), filters=rule), workers=1)
    assert caught.value.hint
