"""Merging, and the tools with Megatron-LM's flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import read_manifest
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.dedup.dedup_datasets import dedup_datasets
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema_processing import Dedup, Near
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import ConfigError, DataError
from tests.synthetic_data import random_documents, write_dataset
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl
from tests.unit.corpus.dedup.test_dedup import document, edited
from tests.unit.corpus.tokenizers.test_stated_tokens import sentencepiece_folder

ROOT = Path(__file__).parents[4]


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def dataset(prefix: Path, texts: list[str], make_corpus: Any, **keys: Any) -> str:
    corpus = make_corpus(write_jsonl(prefix.with_suffix(".jsonl"), texts), output_prefix=str(prefix), **keys)
    preprocess(corpus, workers=1)
    return str(prefix)


def test_merged_equals_preprocessed_together(tmp_path: Path, make_corpus: Any) -> None:
    whole = dataset(tmp_path / "whole", TEXTS, make_corpus)
    parts = [dataset(tmp_path / "set" / n, t, make_corpus) for n, t in (("a", TEXTS[:2]), ("b", TEXTS[2:]))]
    manifest = merge_datasets(parts, str(tmp_path / "merged"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == Path(whole + suffix).read_bytes()
    assert verify_dataset(str(tmp_path / "merged")).ok
    assert manifest.sources[0].documents == len(TEXTS) and [e["prefix"] for e in manifest.config["merged"]] == parts
    with pytest.raises(DataError, match="already a dataset"):
        merge_datasets(parts, str(tmp_path / "merged"))
    result = tool("merge_datasets.py", "--input", tmp_path / "set", "--output-prefix", tmp_path / "by_tool")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "by_tool.idx").read_bytes() == Path(whole + ".idx").read_bytes()


def test_datasets_of_different_tokenizers_do_not_merge(tmp_path: Path, make_corpus: Any) -> None:
    other = build_tokenizer(tmp_path / "other", vocab_size=350)
    a = dataset(tmp_path / "a", TEXTS, make_corpus)
    b = dataset(tmp_path / "b", TEXTS, make_corpus, tokenizer=str(other))
    with pytest.raises(DataError, match="differ in tokenizer"):
        merge_datasets([a, b], str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_megatron_flags_give_megatron_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    """What Megatron-LM's tool writes, by its rules: special tokens parsed, empty documents kept, EOD appended."""
    texts = ["hello world", "", "x<|endoftext|>y", *TEXTS]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    result = tool("preprocess_data.py", "--input", file, "--output-prefix", tmp_path / "a", "--tokenizer-type",
                  "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_dir, "--append-eod", "--workers", 2,
                  "--partitions", 1, "--json-keys", "text")  # fmt: skip
    assert result.returncode == 0, result.stderr
    reader, reference = (
        open_indexed(tmp_path / "a_text_document"),
        load_tokenizer(tokenizer_dir, special_tokens_in_text="parse", backend="reference"),
    )
    for found, text in zip(reader, texts, strict=True):
        ids, _ = reference.encode_batch([text])
        assert np.array_equal(found, [*ids, reference.eod_id] if len(ids) else [])
    assert reader.sequence_count == len(texts) - 1
    assert read_manifest(tmp_path / "a_text_document").append_eod
    result = tool("inspect_dataset.py", tmp_path / "a_text_document", "--tokenizer", tokenizer_dir)
    assert result.returncode == 0 and "hello world" in result.stdout
    result = tool("preprocess_data.py", "--input", "none.jsonl", "--output-prefix", tmp_path / "b",
                  "--tokenizer-model", tokenizer_dir)  # fmt: skip
    assert result.returncode == 2 and "matches no file" in result.stderr


def test_extend_vocabulary(tmp_path: Path, tokenizer_dir: Path) -> None:
    import shutil

    from safetensors.numpy import save_file

    model = tmp_path / "model"
    shutil.copytree(tokenizer_dir, model)
    size = load_tokenizer(tokenizer_dir).vocab_size
    save_file({"model.embed_tokens.weight": np.ones((size, 4), np.float32)}, model / "model.safetensors")
    (model / "config.json").write_text('{"vocab_size": 0}')
    text = write_jsonl(tmp_path / "a.jsonl", ["an electroencephalogram here, an electroencephalogram there"] * 20)
    flags = ["--model", model, "--input", text, "--count", 1, "--output", tmp_path / "new"]
    result = tool("extend_vocabulary.py", *flags)
    assert result.returncode == 0 and "electroencephalogram" in result.stdout, result.stderr
    assert load_tokenizer(tmp_path / "new").vocab_size == size + 1
    result = tool("extend_vocabulary.py", *flags)
    assert result.returncode == 2 and "not empty" in result.stderr
    whole = (model / "model.safetensors").read_bytes()
    flags[-1] = tmp_path / "again"
    for damage in (whole[:-8], whole[:40], b""):
        (model / "model.safetensors").write_bytes(damage)
        result = tool("extend_vocabulary.py", *flags)
        assert result.returncode == 2 and "is damaged" in result.stderr and not (tmp_path / "again").exists()
    (model / "model.safetensors").write_bytes(whole)
    assert tool("extend_vocabulary.py", *flags).returncode == 0


def command(*args: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from megatron_cpt.cli import main; main()", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


def test_split_of_a_dataset_keeps_every_document_once(tmp_path: Path, make_corpus: Any) -> None:
    texts = [f"{text} {i}" for i in range(40) for text in TEXTS]
    whole = dataset(tmp_path / "set", texts, make_corpus)
    result = command("split", whole, "--split", "train=0.8,valid=0.2", "--json")
    assert result.returncode == 0, result.stderr
    parts = {name: {ids.tobytes() for ids in open_indexed(f"{whole}_{name}")} for name in ("train", "valid")}
    assert not parts["train"] & parts["valid"] and 20 < len(parts["valid"]) < 65
    assert parts["train"] | parts["valid"] == {ids.tobytes() for ids in open_indexed(whole)}
    assert all(verify_dataset(f"{whole}_{name}").ok for name in parts)
    assert command("split", whole, "--split", "train=0.8,valid=0.1").returncode == 2
    assert "already a dataset" in command("split", whole, "--split", "train=0.8,valid=0.2").stderr


@pytest.mark.parametrize(
    "fractions",
    [
        "a/b=0.5,c=0.5",
        "../a=1",
        "=1",
        "a=nan,b=0.5",
        "a=inf",
        "a=0,b=1",
        "a=-1,b=2",
        "a=0.5,a=0.5",
        "a=0.5",
        "a",
        "a=x",
    ],
)
def test_a_split_that_is_none_is_refused_by_every_command_and_by_the_corpus(fractions: str, make_corpus: Any) -> None:
    from click.testing import CliRunner

    from megatron_cpt.commands.dataset import split
    from megatron_cpt.commands.preprocess import preprocess as preprocess_command

    for command, args in ((split, ["none"]), (preprocess_command, ["--input", "none.jsonl"])):
        result = CliRunner().invoke(command, [*args, "--split", fractions])
        assert result.exit_code == 2, result.output
        assert "Invalid value for '--split'" in result.output
    parts = dict(part.split("=") for part in fractions.split(",") if "=" in part)
    if len(parts) == fractions.count("="):  # a mapping has no name twice
        with pytest.raises(ConfigError, match="split"):
            make_corpus(Path("none.jsonl"), split=parts or "a")


def test_dedup_of_datasets(tmp_path: Path, make_corpus: Any) -> None:
    texts = [document(i) for i in range(30)]
    a = dataset(tmp_path / "a", texts[:20] + texts[:3], make_corpus)
    b = dataset(tmp_path / "b", [*texts[15:], edited(texts[2], 5, 0.02)], make_corpus)
    expected = {ids.tobytes() for ids in open_indexed(a)} | {ids.tobytes() for ids in open_indexed(b)}
    result = command("dedup", a, b, "--output-prefix", tmp_path / "exact", "--workers", 2)
    assert result.returncode == 0 and "duplicate_exact 8" in result.stdout, result.stderr
    documents = [ids.tobytes() for ids in open_indexed(tmp_path / "exact")]
    assert len(documents) == 31 and set(documents) == expected
    assert verify_dataset(str(tmp_path / "exact")).ok
    manifest = dedup_datasets([a, b], str(tmp_path / "near"), Dedup(near=Near(similarity=0.6)), workers=1)
    assert manifest.document_count == 30 and manifest.rejects == {"duplicate_exact": 8, "duplicate_near": 1}
    assert not list(tmp_path.glob("*.partial"))


def llama3_like(folder: Path) -> Path:
    """The tiny tokenizer with a post-processor that begins every text with a token, as Llama 3's does."""
    from tokenizers import Tokenizer, processors

    build_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("flag", ["", "--tokenizer-hf-include-special-tokens", "--legacy-tokenizer"])
def test_megatron_flags_for_a_tokenizer_that_adds_a_token(tmp_path: Path, flag: str) -> None:
    """The reference is what Megatron-LM calls: transformers' tokenize(), or the tokenizer itself with the flags."""
    transformers = pytest.importorskip("transformers")
    model = llama3_like(tmp_path / "llama3")
    texts = ["hello world", "", "x<|endoftext|>y", *TEXTS]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    result = tool("preprocess_data.py", "--input", file, "--output-prefix", tmp_path / "a", "--tokenizer-model", model,
                  "--append-eod", "--workers", 1, *([flag] if flag else []))  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "documents end with '<|im_end|>'" in result.stderr and "fastokens is not used" not in result.stderr
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for found, text in zip(open_indexed(tmp_path / "a_text_document"), texts, strict=True):
        plain = theirs.convert_tokens_to_ids(theirs.tokenize(text))
        ids = theirs(text).input_ids if flag else plain
        assert found.tolist() == ([*ids, theirs.eos_token_id] if ids else [])
        assert bool(flag) == (len(found) > 0 and found[0] == theirs.bos_token_id)
    # our own default adds nothing
    assert load_tokenizer(model).encode_batch(["hello"])[0][0] != theirs.bos_token_id


def test_the_legacy_flag_is_accepted_for_sentencepiece_and_adds_nothing(tmp_path: Path) -> None:
    model = sentencepiece_folder(tmp_path / "m") / "tokenizer.model"
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    written = {}
    for kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        for flags in ([], ["--legacy-tokenizer"]):
            result = tool("preprocess_data.py", "--input", file, "--output-prefix", tmp_path / f"{kind}{len(flags)}",
                          "--tokenizer-type", kind, "--tokenizer-model", model, "--append-eod", "--workers", 1,
                          *flags)  # fmt: skip
            assert result.returncode == 0, result.stderr
            written[kind, bool(flags)] = (tmp_path / f"{kind}{len(flags)}_text_document.bin").read_bytes()
    assert written["SentencePieceTokenizer", True] == written["SentencePieceTokenizer", False]
    assert written["Llama2Tokenizer", True] != written["Llama2Tokenizer", False]  # it adds BOS


@pytest.mark.parametrize("has_eod", [True, False])
def test_the_legacy_sentencepiece_tokenizer_parses_as_megatrons_does(tmp_path: Path, has_eod: bool) -> None:
    """Megatron-LM's _SentencePieceTokenizer, which cuts the text at its special tokens and encodes what is between."""
    import sentencepiece

    folder = sentencepiece_folder(tmp_path / "m", controls=("<EOD>",) if has_eod else ())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    special = [processor.id_to_piece(i) for i in range(len(processor)) if processor.is_control(i)]
    assert set(special) == {"<s>", "</s>", *(["<EOD>"] if has_eod else [])}

    def theirs(text: str) -> list[int]:
        places = {token: text.index(token) for token in special if token in text}
        if not places:
            return list(processor.encode(text))
        first = min(places, key=places.__getitem__)
        before, _, after = text.partition(first)
        return [*processor.encode(before), processor.piece_to_id(first), *theirs(after)]

    texts = ["a <s> b</s>c", "</s></s> x", "<EOD> and <unk> <pad>", *TEXTS]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    result = tool("preprocess_data.py", "--input", file, "--output-prefix", tmp_path / "a", "--tokenizer-type",
                  "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model", "--append-eod",
                  "--legacy-tokenizer", "--workers", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    end = processor.piece_to_id("<EOD>" if has_eod else "</s>")
    assert [ids.tolist() for ids in open_indexed(tmp_path / "a_text_document")] == [[*theirs(t), end] for t in texts]
    assert ("appends an <EOD>" in result.stderr) is not has_eod


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_merging_any_datasets_of_a_folder_keeps_every_document_in_order(
    tmp_path: Path, sizes: list[int], seed: int
) -> None:
    folder = tmp_path / f"{seed}-{'-'.join(map(str, sizes))}"
    documents = [random_documents(size, 100, seed + index) for index, size in enumerate(sizes)]
    prefixes = [str(write_dataset(folder / f"part{index}", own)) for index, own in enumerate(documents)]
    manifest = merge_datasets(prefixes, str(folder / "merged"), overwrite=True)
    merged = open_indexed(folder / "merged")
    assert [ids.tolist() for ids in merged] == [ids.tolist() for own in documents for ids in own]
    assert manifest.document_count == sum(sizes)
    assert verify_dataset(str(folder / "merged")).ok
