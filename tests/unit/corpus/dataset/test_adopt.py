"""A dataset of another tool is proven, told of, and given a manifest; its bytes stay."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.corpus.dataset.adopt import adopt_dataset
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path, read_manifest
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.corpus.dataset.text_rules import text_rules
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl
from tests.unit.corpus.tokenizers.test_stated_tokens import sentencepiece_folder

EOD = 400
Ids = list[int]


def write_foreign(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> str:
    """PREFIX.bin and PREFIX.idx by Megatron-Core's own builder, nothing else."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(list(ids), dtype=torch.int64), [len(ids)] if len(ids) else [])
    builder.finalize(str(idx_path(prefix)))
    return str(prefix)


@pytest.fixture(scope="module")
def encoded(tokenizer_dir: Path) -> list[Ids]:
    """Documents of text, without EOD."""
    tokenizer = load_tokenizer(tokenizer_dir, backend="reference")
    return [tokenizer.encode_batch([f"{text} {i}"])[0].tolist() for i in range(12) for text in TEXTS]


def digest(prefix: str) -> tuple[str, str]:
    bin_sha, idx_sha = (hashlib.sha256(path(prefix).read_bytes()).hexdigest() for path in (bin_path, idx_path))
    return bin_sha, idx_sha


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_an_adopted_dataset_is_verified_and_its_bytes_stay(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids], dtype: Any, ending: str
) -> None:
    prefix = write_foreign(tmp_path / "foreign", [[*ids, EOD] for ids in [*encoded, []] if ids] + [[]], dtype)
    with pytest.raises(DataError) as caught:
        read_manifest(prefix)
    assert f"megatron-cpt adopt {prefix} --tokenizer" in str(caught.value.hint)
    before = digest(prefix)
    adoption = adopt_dataset(prefix + ending, str(tokenizer_dir))
    assert digest(prefix) == before
    assert read_manifest(prefix) == adoption.manifest
    assert verify_dataset(prefix, str(tokenizer_dir)).ok
    assert (adoption.manifest.document_count, adoption.manifest.append_eod) == (len(encoded) + 1, True)
    assert "every document ends with EOD '<|endoftext|>' = 400" in adoption.proven
    assert any("decoded and tokenised again, come out as the same ids" in fact for fact in adoption.proven)
    assert adoption.samples[0].startswith("The patient presented")
    assert any("special tokens spelled in the text" in fact for fact in adoption.unknown)
    with pytest.raises(DataError, match="has a manifest already"):
        adopt_dataset(prefix, str(tokenizer_dir))


def test_it_equals_our_own_dataset_and_merges_with_it(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids], make_corpus: Any
) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", [f"{text} {i}" for i in range(12) for text in TEXTS]))
    preprocess(corpus, workers=1)
    prefix = write_foreign(tmp_path / "foreign", [[*ids, EOD] for ids in encoded])
    adopted, ours = adopt_dataset(prefix, str(tokenizer_dir)).manifest, read_manifest(corpus.output_prefix)
    assert (adopted.bin_sha256, adopted.idx_sha256) == (ours.bin_sha256, ours.idx_sha256)
    assert adopted.tokenizer == ours.tokenizer
    assert merge_datasets([corpus.output_prefix, prefix], str(tmp_path / "m")).document_count == 2 * len(encoded)


def spoiled(change: Callable[[list[Ids]], list[Ids]]) -> Callable[[list[Ids]], list[Ids]]:
    return lambda documents: change([[*ids, EOD] for ids in documents])


REFUSED: list[tuple[str, Callable[[list[Ids]], list[Ids]], str]] = [
    ("an id of another vocabulary", spoiled(lambda d: [[*d[0][:-1], 5000, EOD], *d[1:]]), "the id 5,000 near token 0"),
    ("some without EOD", spoiled(lambda d: [d[0][:-1], *d[1:]]), "1 of 60 documents do not end with EOD"),
    ("another special token at the end", lambda d: [[*ids, 402] for ids in d], "every document ends with '<|im_end|>'"),
    ("another tokenizer's ids", spoiled(lambda d: [[*((i * 7) % 390 for i in x[:-1]), EOD] for x in d]), "another tok"),
    ("no tokens", lambda d: [[]], "holds no tokens"),
]


def test_documents_that_begin_with_the_eod_are_told_of(tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]) -> None:
    """Where the EOD is the beginning of sequence too, as GPT-2's."""
    prefix = write_foreign(tmp_path / "foreign", [[EOD, *ids] for ids in encoded])
    adoption = adopt_dataset(prefix, str(tokenizer_dir))
    assert text_rules(adoption.manifest).prefix_ids == (EOD,) and not adoption.manifest.append_eod
    assert "every document begins with '<|endoftext|>' = 400" in adoption.proven
    assert text_rules(adoption.manifest).special_tokens_in_text is None


def test_documents_that_were_never_ended_or_have_empty_sequences_are_refused(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]
) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    for name, words in (("not ended", "do not cover"), ("empty", "sequence 0 has no tokens")):
        prefix = str(tmp_path / name)
        builder = indexed_dataset.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
        for ids in ([*own, EOD] for own in encoded):
            if name == "empty":
                builder.add_document(torch.tensor(ids), [0, len(ids)])
            else:
                builder.add_item(torch.tensor(ids))
        builder.finalize(str(idx_path(prefix)))
        with pytest.raises(DataError, match=words) as caught:
            adopt_dataset(prefix, str(tokenizer_dir))
        assert "each document ended" in str(caught.value.hint) and not manifest_path(prefix).exists()


def test_the_ids_that_megatrons_legacy_tokenizer_appends_are_named(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    documents = [[*tokenizer.encode_batch([text])[0].tolist(), tokenizer.vocab_size + 2] for text in TEXTS]
    with pytest.raises(DataError, match="outside the vocabulary") as caught:
        adopt_dataset(write_foreign(tmp_path / "foreign", documents), str(folder))
    assert "--legacy-tokenizer" in str(caught.value.hint)


@pytest.mark.parametrize(("documents", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_not_proven_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids], documents: Callable[[list[Ids]], list[Ids]], message: str
) -> None:
    prefix = write_foreign(tmp_path / "foreign", documents(encoded))
    with pytest.raises(DataError) as caught:
        adopt_dataset(prefix, str(tokenizer_dir))
    assert message in caught.value.message
    assert caught.value.hint
    assert not manifest_path(prefix).exists()


def test_the_hint_for_another_end_of_document_works(tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]) -> None:
    prefix = write_foreign(tmp_path / "foreign", [[*ids, 402] for ids in encoded])
    with pytest.raises(DataError) as caught:
        adopt_dataset(prefix, str(tokenizer_dir))
    assert caught.value.hint == "--eod-token '<|im_end|>'"
    assert adopt_dataset(prefix, str(tokenizer_dir), "<|im_end|>").manifest.tokenizer.eod_id == 402


def test_data_without_eod_is_adopted_as_such(tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]) -> None:
    adoption = adopt_dataset(write_foreign(tmp_path / "foreign", encoded), str(tokenizer_dir))
    assert not adoption.manifest.append_eod
    assert any(fact.startswith("no document ends with EOD") for fact in adoption.proven)


def test_what_the_ids_tell_of_special_tokens_is_recorded(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]
) -> None:
    documents = [[401, *ids, EOD] for ids in encoded]
    begun = adopt_dataset(write_foreign(tmp_path / "begun", documents), str(tokenizer_dir))
    assert text_rules(begun.manifest).prefix_ids == (401,)
    assert "every document begins with '<|im_start|>' = 401" in begun.proven
    parsed = adopt_dataset(
        write_foreign(tmp_path / "parsed", [[*ids, 402, *ids, EOD] for ids in encoded]), str(tokenizer_dir)
    )
    assert text_rules(parsed.manifest).special_tokens_in_text == "parse"
    plain = adopt_dataset(write_foreign(tmp_path / "plain", [[*ids, EOD] for ids in encoded]), str(tokenizer_dir))
    assert (text_rules(plain.manifest).special_tokens_in_text, text_rules(plain.manifest).prefix_ids) == (None, ())
    with pytest.raises(DataError, match="ids before each text"):
        merge_datasets([str(tmp_path / "plain"), str(tmp_path / "begun")], str(tmp_path / "never"))


def test_damaged_files_and_other_types_are_refused(tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]) -> None:
    documents = [[*ids, EOD] for ids in encoded]
    cases: list[tuple[str, Callable[[str], Any], str]] = [
        ("cut", lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes()[:-2]), "is not sound"),
        ("gap", lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes() + b"ab"), "is not sound"),
        ("alone", lambda p: idx_path(p).unlink(), "does not exist"),
        ("no index", lambda p: idx_path(p).write_bytes(b"text"), "is not a Megatron index"),
        ("older", lambda p: idx_path(p).write_bytes(b"TNTIDX\0\0" + bytes(50)), "older kinds"),
        ("modes", lambda p: idx_path(p).write_bytes(idx_path(p).read_bytes() + bytes(60)), "multimodal"),
        ("started", lambda p: Path(f"{p}.partial").mkdir(), "half-written"),
    ]
    for name, damage, message in cases:
        prefix = write_foreign(tmp_path / name, documents)
        damage(prefix)
        with pytest.raises(DataError, match=message):
            adopt_dataset(prefix, str(tokenizer_dir))
        assert not manifest_path(prefix).exists()
    with pytest.raises(DataError, match="stored as int64"):
        adopt_dataset(write_foreign(tmp_path / "wide", documents, np.int64), str(tokenizer_dir))


def test_ids_that_the_model_never_learned_are_named(tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]) -> None:
    def norms() -> np.ndarray:
        rows = np.ones(403, np.float32)
        rows[encoded[0][2]] = 1e-5
        return rows

    documents = [[*ids, EOD] for ids in encoded]
    told = adopt_dataset(write_foreign(tmp_path / "a", documents), str(tokenizer_dir), None, norms).proven[-1]
    assert told.startswith("1 of the")
    assert f"= {encoded[0][2]}" in told
    learned = adopt_dataset(
        write_foreign(tmp_path / "b", documents), str(tokenizer_dir), None, lambda: np.ones(403, np.float32)
    )
    assert "far from zero" in learned.proven[-1]
    with pytest.raises(DataError, match="the model's embedding has 300 rows"):
        adopt_dataset(
            write_foreign(tmp_path / "c", documents), str(tokenizer_dir), None, lambda: np.ones(300, np.float32)
        )


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_norms_are_those_of_the_models_embedding(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from checkpoint_convert.embedding import EMBEDDING, row_norms
    from checkpoint_convert.hf import read_hf
    from megatron_cpt.architecture.families import read_architecture
    from megatron_cpt.architecture.tensors import hf_tensor_shapes

    config = {
        "model_type": "qwen2", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 5000,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype], "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = read_architecture(tmp_path)
    shapes = hf_tensor_shapes(arch)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    tensors = {name: torch.randn(shape).to(kind) for name, shape in shapes.items()}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    expected = tensors[EMBEDDING].float().norm(dim=1).numpy()
    np.testing.assert_allclose(row_norms(read_hf(tmp_path, arch).tensors[EMBEDDING]), expected, rtol=1e-5)


def test_the_command_prints_what_is_proven_and_what_is_not(
    tmp_path: Path, tokenizer_dir: Path, encoded: list[Ids]
) -> None:
    prefix = write_foreign(tmp_path / "foreign", [[*ids, EOD] for ids in encoded])
    line = [sys.executable, "-c", "from megatron_cpt.cli import main; main()", "adopt", prefix]
    wrong = build_tokenizer(tmp_path / "other", vocab_size=300)
    refused = subprocess.run([*line, "--tokenizer", str(wrong)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "hint:" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run([*line, "--tokenizer", str(tokenizer_dir), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["manifest"]["document_count"] == len(encoded) == open_indexed(prefix).document_count
    assert len(shown["proven"]) >= 4
    assert len(shown["unknown"]) >= 2
    assert len(shown["samples"]) == 3
