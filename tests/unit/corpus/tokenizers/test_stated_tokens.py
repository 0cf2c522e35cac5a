"""Tokens that a model folder states beside its tokenizer: the same ids as AutoTokenizer's, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.tokenizers.load import load_tokenizer, tokenizer_fingerprint
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer

SIZE = 403  # ids of the tiny tokenizer, its special tokens included


def folder_with(folder: Path, **files: dict[str, Any]) -> Path:
    build_tokenizer(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, *, special: bool = False, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **plain, **flags}


def config(**keys: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **keys}


def their_ids(folder: Path, texts: list[str], *, split_special: bool) -> list[list[int]]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    keys = {"split_special_tokens": split_special, "add_special_tokens": False}
    return [tokenizer(text, **keys).input_ids for text in texts]


def our_ids(folder: Path, texts: list[str], mode: Any) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, special_tokens_in_text=mode)
    return [tokenizer.encode_batch([text])[0].tolist() for text in texts]


SPELLED = ["a <molecule> b", "x<|doc_end|>y <|im_end|> <molecule><molecule>", "<|pad|>z", "AB <|doc_end|>", *TEXTS]
STATED: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": {
        "tokenizer_config": config(
            added_tokens_decoder={
                str(SIZE + 1): token("<molecule>"),
                str(SIZE): token("<|doc_end|>", special=True),
            }
        )
    },
    "decoder that repeats known tokens": {
        "tokenizer_config": config(
            added_tokens_decoder={"400": token("<|endoftext|>", special=True), str(SIZE): token("<molecule>")}
        )
    },
    "stripping token": {
        "tokenizer_config": config(added_tokens_decoder={str(SIZE): token("<molecule>", lstrip=True, rstrip=True)})
    },
    "added_tokens.json": {"tokenizer_config": config(), "added_tokens": {"<molecule>": SIZE, "<|doc_end|>": SIZE + 1}},
    "special_tokens_map.json": {
        "tokenizer_config": config(),
        "added_tokens": {"<|doc_end|>": SIZE},
        "special_tokens_map": {"pad_token": "<|pad|>", "sep_token": {"content": "<|doc_end|>", "lstrip": True}},
    },
    "named only": {"tokenizer_config": config(pad_token="<|pad|>", extra_special_tokens=["<molecule>"])},
}


@pytest.mark.parametrize("name", STATED)
@pytest.mark.parametrize("mode", ["parse", "literal"])
def test_ids_are_those_of_auto_tokenizer(tmp_path: Path, name: str, mode: str) -> None:
    folder = folder_with(tmp_path / "t", **STATED[name])
    ours = our_ids(folder, SPELLED, mode)
    assert ours == their_ids(folder, SPELLED, split_special=mode == "literal")
    if mode == "parse":  # the tokens do make a difference
        assert ours != our_ids(folder_with(tmp_path / "plain"), SPELLED, mode)


CONTENTS = st.sampled_from(["<molecule>", "<|doc_end|>", "<|pad|>", "ab", "<|im_end|>"])
DECODERS = st.lists(
    st.tuples(CONTENTS, st.booleans(), st.booleans(), st.booleans()), max_size=4, unique_by=lambda t: t[0]
)


@given(DECODERS, st.lists(CONTENTS, max_size=2), st.booleans(), st.sampled_from(["parse", "literal"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_folder_gives_auto_tokenizers_ids_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, stated: list[Any], named: list[str], numbered_right: bool, mode: str
) -> None:
    known = {"<|endoftext|>": 400, "<|im_start|>": 401, "<|im_end|>": 402}
    decoder, next_id = {}, SIZE
    for content, special, lstrip, normalized in stated:
        if content in known:
            index = known[content]
        else:
            index, next_id = next_id, next_id + 1
        wrong = 0 if numbered_right or content in known else 7
        decoder[str(index + wrong)] = token(content, special=special, lstrip=lstrip, normalized=normalized)
    keys = {"added_tokens_decoder": decoder, "extra_special_tokens": named}
    folder = folder_with(tmp_path_factory.mktemp("t") / "t", tokenizer_config=config(**keys))
    try:
        ours = our_ids(folder, SPELLED, mode)
    except DataError as error:
        assert not numbered_right
        assert error.hint
        return
    assert ours == their_ids(folder, SPELLED, split_special=mode == "literal")


def test_the_fingerprint_knows_numbered_tokens_and_no_others(tmp_path: Path) -> None:
    plain = tokenizer_fingerprint(folder_with(tmp_path / "plain"))
    for name in STATED:
        folder = folder_with(tmp_path / name.replace(" ", "_"), **STATED[name])
        assert (tokenizer_fingerprint(folder) == plain) == (name == "named only")
        assert load_tokenizer(folder, backend="reference").fingerprint == tokenizer_fingerprint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer_config": config(added_tokens_decoder={"999": token("<molecule>")})}, "the id 999, which would be"),
        ({"tokenizer_config": config(added_tokens_decoder={"x": token("<molecule>")})}, "does not state tokens"),
        ({"tokenizer_config": config(added_tokens_decoder={"403": {"special": True}})}, "does not state tokens"),
        ({"tokenizer_config": config(added_tokens_decoder=[1])}, "does not state tokens"),
        ({"tokenizer_config": config(eos_token="<|nowhere|>")}, "stated eos_token '<|nowhere|>' is not in the voc"),
        ({"tokenizer_config": config(), "added_tokens": {"<molecule>": "x"}}, "does not state tokens"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    folder = folder_with(tmp_path / "t", **content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_post_processor_that_adds_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(folder_with(tmp_path / "t"), post_processor=True)
    assert "adds nothing to a text" in caplog.text


def sentencepiece_folder(folder: Path, *, controls: tuple[str, ...] = (), **files: dict[str, Any]) -> Path:
    import sentencepiece

    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(TEXTS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["</p>", "</doc>"],
        control_symbols=list(controls),
    )  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_sentencepiece_model_is_refused_beside_tokens_that_it_does_not_have(tmp_path: Path) -> None:
    known = {"1": token("<s>", special=True), "2": token("</s>", special=True), "3": token("</p>")}
    folder = sentencepiece_folder(tmp_path / "m", tokenizer_config={"added_tokens_decoder": known, "eos_token": "</s>"})
    assert load_tokenizer(folder).eod_token == "</s>"
    cases = [
        ({"tokenizer_config": {"added_tokens_decoder": {**known, "9000": token("<molecule>")}}}, "does not have"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": token("</s>", special=True)}}}, "has as the piece 2"),
        ({"tokenizer_config": {}, "added_tokens": {"<molecule>": 9000}}, "does not have"),
        ({"tokenizer_config": {"eos_token": "<|nowhere|>"}}, "stated eos_token"),
    ]
    for files, message in cases:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(folder)
        assert caught.value.hint
        (folder / "added_tokens.json").unlink(missing_ok=True)
