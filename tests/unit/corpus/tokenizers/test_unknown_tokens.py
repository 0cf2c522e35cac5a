"""Text that a vocabulary cannot say is counted and told of: what it was is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_cpt.commands.preprocess import outcome_text
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from tests.unit.corpus.conftest import write_jsonl

TEXTS = ["plain words", "words § of ☃ plain", "plain", "☃"]


def word_level(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "plain": 1, "words": 2, "of": 3}, unk_token="<unk>"))
    return saved(tokenizer, folder)


def unigram(folder: Path) -> Path:
    pieces = [("plain", -1.0), ("<unk>", 0.0), ("words", -1.0), ("of", -1.0)]
    return saved(Tokenizer(models.Unigram(pieces, unk_id=1)), folder)


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece(folder: Path) -> Path:
    import sentencepiece as library

    folder.mkdir()
    (folder / "text.txt").write_text("plain words of many\nmore plain words\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.parametrize("build", [word_level, unigram, sentencepiece])
def test_unknown_tokens_are_counted_in_the_output_and_the_report_by_source(
    tmp_path: Path, make_corpus: Any, build: Callable[[Path], Path]
) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", own)) for name, own in (("a", TEXTS[:1]), ("b", TEXTS[1:]))]
    sources = [{"name": Path(file).stem, "files": file} for file in files]
    model = build(tmp_path / "model")
    corpus = make_corpus(sources=sources, tokenizer=str(model), append_eod=False)
    outcome = preprocess(corpus, workers=1)
    unknown_id = load_tokenizer(model).unknown_id
    assert sum(int((ids == unknown_id).sum()) for ids in open_indexed(corpus.output_prefix)) == 3
    assert outcome.notes == {"unknown_tokens": 3, "documents_with_unknown_tokens": 2}
    assert "its unknown token: 3 tokens in 2 documents" in outcome_text(outcome)
    page = Path(f"{corpus.output_prefix}.report.html").read_text()
    assert "b: text that the tokenizer cannot say" in page and "a: text that the tokenizer cannot say" not in page
    assert preprocess(corpus, workers=1).notes == outcome.notes  # of a run that is done


def test_a_vocabulary_of_bytes_has_nothing_unknown(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    assert load_tokenizer(tokenizer_dir).unknown_id is None
    outcome = preprocess(make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS)), workers=1)
    assert not outcome.notes and "unknown token" not in outcome_text(outcome)
