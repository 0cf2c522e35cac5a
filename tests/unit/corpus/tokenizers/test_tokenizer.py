"""The tokenizer interface: equality with the reference, EOD, fingerprint, special tokens in text."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.corpus.tokenizers import huggingface as tokenizer_huggingface
from megatron_cpt.corpus.tokenizers.load import load_tokenizer, tokenizer_fingerprint
from megatron_cpt.corpus.tokenizers.self_check import SELF_CHECK_SAMPLE
from megatron_cpt.corpus.tokenizers.tokenizer import encodings_equal
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer


def test_fast_backend_is_chosen_and_equals_the_reference(tokenizer_dir: Path) -> None:
    fast = load_tokenizer(tokenizer_dir)
    reference = load_tokenizer(tokenizer_dir, backend="reference")
    assert (fast.backend, reference.backend) == ("fastokens", "tokenizers")
    assert len(SELF_CHECK_SAMPLE) > 400
    assert encodings_equal(reference.encode_batch, fast.encode_batch, [*SELF_CHECK_SAMPLE, *TEXTS])
    assert fast.dtype == "uint16" and fast.vocab_size < 500


def test_backend_that_differs_is_not_used_and_a_line_says_so(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tokenizer_huggingface._fastokens

    def off_by_one(file: Path, split_special: bool, post_processor: bool) -> object:
        encode = real(file, split_special, post_processor)

        def wrong(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, lengths = encode(texts)
            return np.where(ids == ids[-1], ids ^ 1, ids), lengths

        return wrong

    monkeypatch.setattr(tokenizer_huggingface, "_fastokens", off_by_one)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(tokenizer_dir).backend == "tokenizers"
    assert "differ from the reference" in caplog.text


def test_special_tokens_in_text(tokenizer_dir: Path) -> None:
    text = "before <|im_end|> after <|endoftext|>"
    literal = load_tokenizer(tokenizer_dir)
    ids, _ = literal.encode_batch([text])
    assert not set(ids.tolist()) & literal.special_ids
    assert literal.decode(ids.tolist()) == text
    parsed = load_tokenizer(tokenizer_dir, special_tokens_in_text="parse")
    ids, _ = parsed.encode_batch([text])
    assert ids[-1] == parsed.eod_id and len(set(ids.tolist()) & parsed.special_ids) == 2


@pytest.mark.parametrize(
    ("eos", "stated", "expected"),
    [
        ("<|im_end|>", None, "<|endoftext|>"),
        ("<|im_end|>", "<|im_end|>", "<|im_end|>"),
        ("<|endoftext|>", None, "<|endoftext|>"),
    ],
)
def test_eod_is_never_a_chat_token_silently(tmp_path: Path, eos: str, stated: str | None, expected: str) -> None:
    folder = build_tokenizer(tmp_path / "t", eos=eos)
    assert load_tokenizer(folder, eod_token=stated).eod_token == expected


def test_eod_unknown_or_absent_is_an_error(tmp_path: Path) -> None:
    folder = build_tokenizer(tmp_path / "t", eos="<|im_end|>")
    with pytest.raises(DataError, match="not in the vocabulary"):
        load_tokenizer(folder, eod_token="</none>")
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|endoftext|>"]
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="no known end-of-document") as caught:
        load_tokenizer(folder)
    assert "--eod-token" in str(caught.value.hint)


def test_fingerprint_is_of_the_content(tokenizer_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tokenizer_dir, copy)
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["truncation"] = {"max_length": 7, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    raw["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    (copy / "tokenizer.json").write_text(json.dumps(raw, indent=1))
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer_dir / "tokenizer.json")
    assert len(load_tokenizer(copy).encode_batch(["word " * 50])[0]) > 7
    raw["added_tokens"][0]["content"] = "<|other|>"
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(tokenizer_dir)


def test_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(TEXTS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_sentencepiece(sentencepiece_model: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model.parent)
    assert (tokenizer.kind, tokenizer.eod_token, tokenizer.eod_id) == ("sentencepiece", "</s>", processor.eos_id())
    ids, lengths = tokenizer.encode_batch([*TEXTS, "", "a </s> b"])
    assert ids.tolist() == [i for text in [*TEXTS, "", "a </s> b"] for i in processor.encode(text)]
    assert len(lengths) == len(TEXTS) + 2 and tokenizer.vocab_size == processor.get_piece_size()
    assert tokenizer.fingerprint == tokenizer_fingerprint(sentencepiece_model)
    parsed = load_tokenizer(sentencepiece_model, special_tokens_in_text="parse")
    assert tokenizer.eod_id not in ids.tolist() and tokenizer.eod_id in parsed.encode_batch(["a </s> b"])[0].tolist()
    (sentencepiece_model.parent / "bad.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(sentencepiece_model.parent / "bad.model")


def test_tiktoken_ranks(tmp_path: Path) -> None:
    import base64

    import tiktoken

    from megatron_cpt.corpus.tokenizers.tiktoken import KNOWN

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258, "中".encode()[:2]: 259}
    file = tmp_path / "mine.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    with pytest.raises(DataError, match="no split pattern") as caught:
        load_tokenizer(file)
    assert "mine.json" in str(caught.value.hint)
    settings = {"pattern": KNOWN["qwen"]["pattern"], "special_tokens": {"<|endoftext|>": 300}, "normalize": "NFC"}
    file.with_suffix(".json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(file)
    reference = tiktoken.Encoding("r", pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens={})
    texts = [*TEXTS[:4], "the <|endoftext|> the", "e\u0301"]
    ids, _ = tokenizer.encode_batch(texts)
    expected = [i for text in [*texts[:-1], "é"] for i in reference.encode_ordinary(text)]
    assert ids.tolist() == expected and tokenizer.decode(ids.tolist()[-2:]) == "é"
    assert (tokenizer.kind, tokenizer.eod_id, tokenizer.vocab_size) == ("tiktoken", 300, 301)
    assert tokenizer.fingerprint == tokenizer_fingerprint(file)
    parsed = load_tokenizer(file, special_tokens_in_text="parse", backend="reference")
    assert 300 in parsed.encode_batch(texts)[0].tolist() and 300 not in ids.tolist()


def test_a_panic_of_the_library_is_an_error_and_no_traceback(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):  # as pyo3 derives it: no Exception
        pass

    class Breaks:
        def __getattr__(self, name: str) -> object:
            raise PanicException("AddedVocabulary bad split")

    reference = tokenizer_huggingface._Reference(
        (tokenizer_dir / "tokenizer.json").read_text(), tokenizer_dir / "tokenizer.json", True, False
    )
    monkeypatch.setattr(reference, "_tokenizer", Breaks())
    with pytest.raises(DataError, match=r"breaks down with .*tokenizer\.json: AddedVocabulary bad split"):
        reference.encode_batch(["a"])
