"""What the datasets of a run must have in common, and what is said where they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.load import build_config
from megatron_cpt.corpus.dataset.manifest import read_manifest, write_manifest
from megatron_cpt.data.datasets import Datasets, check_datasets
from megatron_cpt.errors import DataError
from tests.synthetic_data import random_documents, write_dataset

ARCH = Architecture(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2,
    head_dim=4, vocab_size=128, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tie_word_embeddings=True, qkv_bias=False, qk_norm=False, sliding_window=None, dtype="bfloat16",
)  # fmt: skip


def dataset(prefix: Path, seed: int, **changes: Any) -> str:
    write_dataset(prefix, random_documents(20, 128, seed=seed))
    manifest = read_manifest(prefix)
    tokenizer = replace(manifest.tokenizer, **changes.pop("tokenizer", {}))
    write_manifest(prefix, replace(manifest, tokenizer=tokenizer, **changes))
    return str(prefix)


def check(folder: Path, *overrides: str, **others: dict[str, Any]) -> Datasets:
    """Check source `a`, and each of `others` (name -> changes to its manifest) as a source or, `v...`, held out."""
    train = [{"name": "a", "prefix": dataset(folder / "a", 1, config={"special_tokens_in_text": "literal"})}]
    validation = {}
    for seed, (name, changes) in enumerate(others.items(), start=2):
        prefix = dataset(folder / name, seed, **changes)
        if name.startswith("v"):
            validation[name] = prefix
        else:
            train.append({"name": name, "prefix": prefix})
    raw = {
        "job_name": "t",
        "model": {"init_from": "m"},
        "batch": {"seq_length": 32},
        "data": {"train": train, "validation": validation},
    }
    return check_datasets(build_config(raw, overrides), ARCH, folder)


@pytest.mark.parametrize("name", ["b", "valid"])
def test_documents_without_eod_cannot_be_kept_apart(tmp_path: Path, name: str) -> None:
    without = {name: {"append_eod": False}}
    assert len(check(tmp_path / "packed", **without).train) >= 1
    with pytest.raises(DataError, match=f"those of '{name}' have none") as caught:
        check(tmp_path / "apart", "model.document_attention=true", **without)
    assert "--append-eod" in str(caught.value.hint)
    assert check(tmp_path / "both", "model.document_attention=true", **{name: {}})


@pytest.mark.parametrize("name", ["b", "valid"])
@pytest.mark.parametrize("stated", [5, 127])
def test_an_eod_that_does_not_end_the_documents_cannot_keep_them_apart(tmp_path: Path, name: str, stated: int) -> None:
    """The manifest says so; the bytes do not."""
    other = {name: {"tokenizer": {"eod_id": stated, "eod_token": "<other>"}}}
    assert check(tmp_path / "packed", **other)
    with pytest.raises(DataError, match=f"'<other>' = {stated}, and document 0 of '{name}' ends with 0") as caught:
        check(tmp_path / "apart", "model.document_attention=true", **other)
    assert "megatron-cpt verify" in str(caught.value.hint)


def test_one_document_without_eod_among_others_is_found(tmp_path: Path) -> None:
    documents = random_documents(50, 128, seed=3)
    documents[37] = documents[37][:-1]
    prefix = write_dataset(tmp_path / "c", documents)
    raw = {
        "job_name": "t",
        "model": {"init_from": "m", "document_attention": True},
        "batch": {"seq_length": 32},
        "data": {"train": [{"name": "c", "prefix": str(prefix)}]},
    }
    with pytest.raises(DataError, match="document 37 of 'c' ends with"):
        check_datasets(build_config(raw, ()), ARCH, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"special_tokens_in_text": "parse"}}, "parsed against plain text"),
        ({"append_eod": False}, "does not end them so"),
        ({"tokenizer": {"eod_id": 5, "eod_token": "<other>"}}, "EOD: '<other>' against '<eod>'"),
    ],
)
@pytest.mark.parametrize("name", ["b", "valid"])
def test_datasets_by_other_rules_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str, name: str
) -> None:
    check(tmp_path, **{name: changes})
    assert f"datasets {name!r} and 'a' were not written by the same rules" in caplog.text
    assert words in caplog.text


def test_datasets_by_the_same_rules_are_not_remarked_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(tmp_path, b={"config": {"special_tokens_in_text": "reject"}}, valid={"config": {}})
    assert "same rules" not in caplog.text
