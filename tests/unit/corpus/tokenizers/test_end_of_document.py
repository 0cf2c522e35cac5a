"""The end of document is special by its role: one per document, at its end, whatever the text spells."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, read_manifest, write_manifest
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.corpus.dataset.split import split_dataset
from megatron_cpt.corpus.dataset.text_rules import text_rules
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl


def with_tokens(folder: Path, tokens: dict[str, bool], **config: Any) -> Path:
    """The tiny tokenizer with its special tokens replaced by `tokens`: content -> whether it is special."""
    build_tokenizer(folder)
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [
        {"id": 400 + i, "content": content, **flags, "special": special}
        for i, (content, special) in enumerate(tokens.items())
    ]
    file.write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_fallback_is_a_special_token_never_a_plain_one(tmp_path: Path) -> None:
    """Gemma's vocabulary holds the HTML tags, `</s>` among them, as plain tokens; its end of text is `<eos>`."""
    gemma = with_tokens(tmp_path / "gemma", {"</s>": False, "<eos>": True, "<pad>": True})
    assert load_tokenizer(gemma).eod_token == "<eos>"
    for token in ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"):
        folder = with_tokens(tmp_path / token.strip("<>/|"), {token: False, "<other>": True})
        with pytest.raises(DataError, match="no known end-of-document token"):
            load_tokenizer(folder)
        assert load_tokenizer(folder, eod_token=token).eod_token == token


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_text_that_spells_the_eod_does_not_become_it(tmp_path: Path, is_special: bool, backend: Any) -> None:
    folder = with_tokens(tmp_path / "t", {"<|sep|>": is_special, "<tag>": False})
    tokenizer = load_tokenizer(folder, eod_token="<|sep|>", backend=backend)
    ids = tokenizer.encode_batch(["a <|sep|> b <tag>"])[0].tolist()
    assert tokenizer.eod_id == 400
    assert 400 not in ids
    assert 401 in ids  # a plain added token is still one
    assert tokenizer.decode(ids) == "a <|sep|> b <tag>"
    assert 400 in tokenizer.special_ids
    assert (
        400 in load_tokenizer(folder, eod_token="<|sep|>", special_tokens_in_text="parse").encode_batch(["<|sep|>"])[0]
    )


TEXTS_WITH_EOD = ["a <|sep|> b", "plain text", "<|sep|>", "ends with it<|sep|>"]


@pytest.mark.parametrize(("mode", "documents"), [("literal", 4), ("reject", 1), ("parse", 4)])
def test_each_document_has_one_eod_at_its_end(tmp_path: Path, make_corpus: Any, mode: str, documents: int) -> None:
    folder = with_tokens(tmp_path / "t", {"<|sep|>": False})
    keys = {"tokenizer": str(folder), "eod_token": "<|sep|>", "special_tokens_in_text": mode, "max_reject_ratio": 1.0}
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS_WITH_EOD), **keys)
    outcome = preprocess(corpus, workers=1)
    found = [int((ids == 400).sum()) for ids in open_indexed(corpus.output_prefix)]
    assert len(found) == documents
    assert (found == [1] * documents) == (mode != "parse")
    assert outcome.rejects == ({"special_token_in_text": 3} if mode == "reject" else {})
    verification = verify_dataset(corpus.output_prefix)
    assert verification.ok
    assert ("EOD stands nowhere else" in verification.checks) == (mode != "parse")


def test_an_eod_that_is_a_word_of_the_model_rejects_the_documents_that_hold_it(
    tmp_path: Path, make_corpus: Any
) -> None:
    tokenizer = load_tokenizer(build_tokenizer(tmp_path / "t"))
    word = "a"  # a byte of the vocabulary: no tokenizer can tell it from text
    assert tokenizer.encode_batch([word])[0].tolist() == [tokenizer.encode_batch(["Zaz"])[0].tolist()[1]]
    texts = ["ZZZ", "ZaZ", "Za"]
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", texts), eod_token=word, max_reject_ratio=1.0)
    assert preprocess(corpus, workers=1).rejects == {"end_of_document_in_text": 2}
    assert open_indexed(corpus.output_prefix).document_count == 1


def test_verify_finds_an_eod_inside_a_document(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    preprocess(corpus, workers=1)
    prefix, manifest = corpus.output_prefix, read_manifest(corpus.output_prefix)
    ids = np.fromfile(bin_path(prefix), manifest.dtype)
    ids[3] = manifest.tokenizer.eod_id
    ids.tofile(bin_path(prefix))
    problems = verify_dataset(prefix).problems
    assert any("sha256" in problem for problem in problems)
    digest = hashlib.sha256(bin_path(prefix).read_bytes()).hexdigest()
    write_manifest(prefix, dataclasses.replace(manifest, bin_sha256=digest))
    assert verify_dataset(prefix).problems == ("EOD 400 stands 1 times before the end of a document",)


def ending_with_eod(folder: Path) -> Path:
    """A tokenizer whose post-processor begins and ends every text itself."""
    from tokenizers import Tokenizer, processors

    with_tokens(folder, {"<s>": True, "</s>": True}, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 400), ("</s>", 401)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("append", [True, False])
def test_an_eod_that_the_post_processor_adds_is_not_added_again(tmp_path: Path, make_corpus: Any, append: bool) -> None:
    folder = ending_with_eod(tmp_path / "t")
    keys = {"tokenizer": str(folder), "post_processor": True, "append_eod": append}
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), **keys)
    preprocess(corpus, workers=1)
    for ids in open_indexed(corpus.output_prefix):
        assert ids[0] == 400
        assert ids[-1] == 401
        assert (ids == 401).sum() == 1
    manifest = read_manifest(corpus.output_prefix)
    assert manifest.append_eod
    assert text_rules(manifest).prefix_ids == (400,)
    assert verify_dataset(corpus.output_prefix).ok


def test_datasets_by_other_rules_do_not_merge_and_a_merged_one_keeps_its_rules(
    tmp_path: Path, make_corpus: Any
) -> None:
    folder = ending_with_eod(tmp_path / "t")
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]

    def dataset(name: str, **keys: Any) -> str:
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        preprocess(make_corpus(source, output_prefix=str(tmp_path / name), tokenizer=str(folder), **keys), workers=1)
        return str(tmp_path / name)

    plain, rejecting = dataset("plain"), dataset("rejecting", special_tokens_in_text="reject")
    others = {
        "special tokens spelled in the text: parsed against plain text": dataset("p", special_tokens_in_text="parse"),
        r"ids before each text: \[400\] against none": dataset("bos", post_processor=True),
    }
    merged = str(tmp_path / "merged")
    assert text_rules(merge_datasets([plain, rejecting], merged)).special_tokens_in_text == "literal"
    for message, other in others.items():
        for first in (plain, merged):
            with pytest.raises(DataError, match=message):
                merge_datasets([first, other], str(tmp_path / "never"))
    for prefix, manifest in split_dataset(merged, {"a": 0.5, "b": 0.5}).items():
        assert text_rules(manifest).special_tokens_in_text == "literal"
        assert "EOD stands nowhere else" in verify_dataset(prefix).checks


def test_a_manifest_of_an_older_version_tells_what_its_config_says(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    preprocess(corpus, workers=1)
    manifest = read_manifest(corpus.output_prefix)
    older = {key: value for key, value in manifest.config.items() if key != "text_rules"}
    assert text_rules(dataclasses.replace(manifest, config=older)) == text_rules(manifest)
    unknown = text_rules(dataclasses.replace(manifest, config={"merged": []}))
    assert (unknown.text_gives_special_ids, unknown.prefix_ids) == (None, None)
