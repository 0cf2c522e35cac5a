"""Chunking at its edges, and what each mode writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.filters.chunking import character_windows, chunk_tokens, sentence_groups, window_starts
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import ConfigError
from tests.unit.corpus.conftest import TEXTS, write_jsonl


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [
        (1, 4, 0, [0]), (4, 4, 0, [0]), (5, 4, 0, [0, 4]), (8, 4, 0, [0, 4]), (9, 4, 0, [0, 4, 8]),
        (4, 4, 2, [0]), (5, 4, 2, [0, 2]), (6, 4, 2, [0, 2]), (7, 4, 2, [0, 2, 4]),
        (32_768, 32_768, 2_048, [0]), (32_769, 32_768, 2_048, [0, 30_720]),
    ],
)  # fmt: skip
def test_window_edges(length: int, size: int, overlap: int, starts: list[int]) -> None:
    assert list(window_starts(length, size, overlap)) == starts


@given(st.integers(0, 500), st.integers(1, 60), st.integers(0, 59))
def test_windows_cover_everything_and_none_is_superfluous(length: int, size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    starts = list(window_starts(length, size, overlap))
    covered = sorted({i for start in starts for i in range(start, min(start + size, length))})
    assert covered == list(range(length))
    assert len(starts) == 1 or starts[-2] + size < length


@given(st.text(alphabet='ab .!?。\n中"', max_size=200), st.integers(1, 40))
def test_sentence_groups_join_to_the_text(text: str, size: int) -> None:
    chunks = sentence_groups(text, size)
    assert "".join(chunks) == text
    assert all(len(chunk) <= size for chunk in chunks)


def test_sentences_are_not_cut_when_they_fit() -> None:
    text = "One two. Three four! 第一条。第二条。\nLast line"
    assert sentence_groups(text, 12) == ["One two. ", "Three four! ", "第一条。第二条。\n", "Last line"]
    assert sentence_groups(text, 21) == ["One two. Three four! ", "第一条。第二条。\nLast line"]
    assert sentence_groups("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 11))
def test_token_windows_equal_a_simple_loop(lengths: list[int], size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    ids = np.arange(sum(lengths), dtype=np.int32)
    out, sequence_lengths, counts = chunk_tokens(ids, np.array(lengths), size, overlap)
    expected, expected_counts, begin = [], [], 0
    for length in lengths:
        document = ids[begin : begin + length].tolist()
        windows = [document[s : s + size] for s in window_starts(length, size, overlap)] if length else []
        expected += windows
        expected_counts.append(len(windows))
        begin += length
    assert counts.tolist() == expected_counts
    assert [w.tolist() for w in np.split(out, np.cumsum(sequence_lengths)[:-1])] == (expected or [[]])


@pytest.mark.parametrize(
    "chunking",
    [
        {"mode": "tokens", "size": 7}, {"mode": "tokens", "size": 7, "overlap": 3},
        {"mode": "characters", "size": 30}, {"mode": "characters", "size": 30, "overlap": 10},
        {"mode": "sentences", "size": 40},
    ],
)  # fmt: skip
def test_modes_end_to_end(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path, chunking: dict[str, Any]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = make_corpus(file, chunking=chunking)
    preprocess(corpus, workers=1)
    reader, tokenizer = open_indexed(corpus.output_prefix), load_tokenizer(tokenizer_dir)
    assert verify_dataset(corpus.output_prefix, str(tokenizer_dir)).ok
    assert reader.document_count == len(TEXTS) < reader.sequence_count
    for index, text in enumerate(TEXTS):
        first, last = reader.document_indices[index : index + 2]
        sequences = [reader.sequence(i).tolist() for i in range(first, last)]
        assert [s[-1] == tokenizer.eod_id for s in sequences] == [False] * (len(sequences) - 1) + [True]
        if chunking["mode"] == "tokens":
            assert all(len(s) <= 7 for s in sequences)
            overlap = chunking.get("overlap", 0)
            joined = sequences[0] + [i for s in sequences[1:] for i in s[overlap:]]
            whole, _ = tokenizer.encode_batch([text])
            assert joined == [*whole.tolist(), tokenizer.eod_id]
        elif chunking["mode"] == "characters":
            pieces = character_windows(text, 30, chunking.get("overlap", 0))
            encoded, lengths = tokenizer.encode_batch(pieces)
            assert [i for s in sequences for i in s][:-1] == encoded.tolist() and len(lengths) == len(sequences)


def test_reject_mode_counts_spelled_tokens_not_our_own_eod(tmp_path: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "spelled <|endoftext|> here", "or <|im_end|>"])
    outcome = preprocess(make_corpus(file, special_tokens_in_text="reject"), workers=1)
    assert outcome.rejects == {"special_token_in_text": 2}
    (manifest,) = outcome.datasets.values()
    assert manifest.document_count == len(TEXTS)


def test_overlap_must_leave_an_advance(make_corpus: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be less than size"):
        make_corpus(tmp_path, chunking={"mode": "tokens", "size": 8, "overlap": 8})
