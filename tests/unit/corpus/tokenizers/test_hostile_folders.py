"""Random model folders that contradict themselves: AutoTokenizer's ids, or a clear refusal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.tokenizers import huggingface
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import build_tokenizer
from tests.unit.corpus.tokenizers.hostile_folders import hostile_texts, our_ids, their_ids, verdict, write_folder

FOLDERS = 150

pytest.importorskip("transformers", minversion="5.0")  # before it, classes took tokenizer.json as it stands


@pytest.mark.filterwarnings("ignore")  # what transformers says of hostile folders
def test_a_hostile_folder_gives_auto_tokenizers_ids_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tally() -> Counter[str]:
        outcomes = {seed: verdict(tmp_path / str(seed), seed) for seed in range(FOLDERS)}
        differing.append([(seed, why) for seed, (what, why) in outcomes.items() if what == "differs"])
        return Counter(what for what, _ in outcomes.values())

    differing: list[list[tuple[int, str]]] = []
    for seed in range(FOLDERS):
        write_folder(tmp_path / str(seed), seed)
    told = tally()
    assert differing == [[]]
    assert told["equal"] > FOLDERS // 4
    assert told["refused"] < FOLDERS * 2 // 3
    monkeypatch.setattr(huggingface, "check_stated_class", lambda *_: None)
    assert tally()["differs"]  # the comparison can fail


def _folder(folder: Path, changes: dict[str, Any], **config: Any) -> Path:
    build_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | config))
    return folder


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({}, {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}, "Qwen2Tokenizer builds another pre_tok"),
        ({"normalizer": None}, {"tokenizer_class": "Qwen2TokenizerFast"}, "Qwen2Tokenizer builds another normalizer"),
        ({}, {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>"}, "adds the token '<pad>'"),
        ({}, {"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer builds another model and normalizer and pre_tok"),
        ({}, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, "BertTokenizer may build another tokenizer"),
        ({}, {"auto_map": {"AutoTokenizer": ["code.Own", None]}}, "code of its own"),
    ],
)
def test_a_class_that_builds_another_tokenizer_is_refused_and_the_hint_works(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    folder = _folder(tmp_path / "t", changes, **config)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert reason in caught.value.message
    assert "PreTrainedTokenizerFast" in caught.value.hint
    texts = hostile_texts(1)
    general = {key: value for key, value in config.items() if key != "auto_map"}
    new = _folder(tmp_path / "new", changes, **general | {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert our_ids(new, texts, "parse") == their_ids(new, texts, "parse")


def test_auto_tokenizers_ids_are_had_by_saving_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = _folder(tmp_path / "t", {}, tokenizer_class="Qwen2Tokenizer", add_prefix_space=True)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
    settings = tmp_path / "new" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    texts = hostile_texts(1)
    assert our_ids(tmp_path / "new", texts, "parse") == their_ids(folder, texts, "parse")


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", None])
def test_a_class_that_builds_what_the_file_says_is_read(tmp_path: Path, name: str | None) -> None:
    folder = _folder(tmp_path / "t", {}, **({"tokenizer_class": name} if name else {}))
    (folder / "config.json").write_text('{"model_type": "%s"}' % ("qwen3" if name and "Qwen" in name else "qwen2"))
    texts = hostile_texts(2)
    assert our_ids(folder, texts, "literal") == their_ids(folder, texts, "literal")
