"""Decontamination equals looking for shared n-grams of words one by one."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.decontamination import Decontaminator
from megatron_cpt.corpus.schema import parse_corpus
from tests.unit.corpus.conftest import write_jsonl

NGRAM_WORDS = 5
_word = st.sampled_from(["alpha", "Beta", "gamma,", "(delta)", "e-mail", "zeta."])
_text = st.lists(_word, min_size=NGRAM_WORDS, max_size=14).map(" ".join)


def ngrams(text: str) -> list[tuple[str, ...]]:
    words = re.sub(r"[^\w\s]+|_", " ", text.lower()).split()
    return [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    exam=st.lists(_text, min_size=1, max_size=3), texts=st.lists(_text, min_size=1, max_size=8), least=st.integers(1, 3)
)
def test_documents_are_dropped_as_plain_comparison_says(
    tmp_path: Path, exam: list[str], texts: list[str], least: int
) -> None:
    write_jsonl(tmp_path / "exam.jsonl", exam)
    rule = {"files": [str(tmp_path / "exam.jsonl")], "ngram_words": NGRAM_WORDS, "min_matches": least}
    raw = {"output_prefix": "x", "tokenizer": "x", "sources": [{"files": "x"}], "decontaminate": rule}
    corpus = parse_corpus(raw, "test")
    assert corpus.decontaminate is not None
    known = {ngram for text in exam for ngram in ngrams(text)}
    clean = [text for text in texts if sum(ngram in known for ngram in ngrams(text)) < least]
    tally = UnitTally()
    batch = Decontaminator(corpus.decontaminate, corpus)(Batch("f", texts, list(range(1, len(texts) + 1))), tally)
    assert batch.texts == clean
    assert tally.counts["contaminated"] == len(texts) - len(clean)
