"""Tokens and document boundaries: the same from a dataset and from its text; mistakes are user errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import Corpus, Source
from megatron_cpt.errors import DataError
from megatron_cpt.eval.token_stream import open_token_stream
from tests.unit.eval.conftest import TEXTS, write_tokenizer

VOCAB = 261


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def prefix(jsonl: Path, model_dir: Path, tmp_path: Path) -> str:
    source = Source(files=(str(jsonl),), text="body")
    corpus = Corpus(output_prefix=str(tmp_path / "d"), tokenizer=str(model_dir), sources=(source,))
    preprocess(corpus, workers=1)
    return corpus.output_prefix


def test_dataset_and_text_give_the_same_stream(prefix: str, jsonl: Path, model_dir: Path) -> None:
    from_dataset = open_token_stream(prefix, model_dir, VOCAB)
    from_text = open_token_stream(str(jsonl), model_dir, VOCAB, "body")
    np.testing.assert_array_equal(from_dataset.tokens, from_text.tokens)
    np.testing.assert_array_equal(from_dataset.document_ends, from_text.document_ends)
    lengths = [len(text) + 1 for text in TEXTS if text]  # bytes, and the end of the document
    assert from_text.document_ends.tolist() == np.cumsum(lengths).tolist()
    assert [int(t) for t in from_text.tokens[from_text.document_ends - 1]] == [0] * len(lengths)


def test_a_text_file_is_one_document(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    stream = open_token_stream(str(tmp_path / "a.txt"), model_dir, VOCAB)
    assert len(stream.tokens) == 8 and stream.document_ends.tolist() == [8]


def test_data_of_another_tokenizer_is_refused(prefix: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", extra="zz")
    with pytest.raises(DataError, match="another one"):
        open_token_stream(prefix, tmp_path / "other", VOCAB)


def test_ids_beyond_the_model_are_refused(prefix: str, model_dir: Path) -> None:
    with pytest.raises(DataError, match="vocabulary has 50 rows"):
        open_token_stream(prefix, model_dir, 50)


def test_a_model_without_tokenizer_still_reads_datasets(prefix: str, tmp_path: Path) -> None:
    assert len(open_token_stream(prefix, tmp_path / "none", VOCAB).tokens) > 0


def test_a_bad_line_is_named(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl, record 2: invalid_json"):
        open_token_stream(str(tmp_path / "bad.jsonl"), model_dir, VOCAB)


@pytest.mark.parametrize("name", ["nowhere", "empty.txt"])
def test_nothing_to_read_is_a_user_error(name: str, tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        open_token_stream(str(tmp_path / name), model_dir, VOCAB)
