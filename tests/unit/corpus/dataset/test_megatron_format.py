"""Our files and Megatron-Core's: read back identically, and equal byte for byte to what its builder writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from tests.unit.corpus.conftest import TEXTS, write_jsonl

GOLDEN = Path(__file__).parents[3] / "golden" / "corpus_index.json"


@pytest.fixture
def dataset(tmp_path: Path, make_corpus: Any) -> str:
    """Documents of all kinds, empty ones kept as Megatron-LM keeps them."""
    texts = ["hello world", "", "   ", *TEXTS, "", "x<|endoftext|>y"]
    corpus = make_corpus(
        write_jsonl(tmp_path / "a.jsonl", texts), keep_empty_documents=True, special_tokens_in_text="parse"
    )
    preprocess(corpus, workers=1)
    return str(corpus.output_prefix)


def test_megatron_core_reads_the_same(dataset: str) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs, ours = indexed_dataset.IndexedDataset(dataset), open_indexed(dataset)
    assert len(theirs) == ours.sequence_count > 5
    for i in range(len(theirs)):
        assert np.array_equal(theirs[i], ours.sequence(i))
    assert np.array_equal(theirs.document_indices, ours.document_indices)
    assert np.array_equal(theirs.sequence_lengths, ours.sequence_lengths)


def test_bytes_equal_what_megatron_core_writes(dataset: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    def build(prefix: str, change_last_id: int) -> tuple[bytes, bytes]:
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        documents = [document.astype(np.int64) for document in open_indexed(dataset)]
        documents[-1][-1] += change_last_id
        for document in documents:
            builder.add_document(torch.from_numpy(document), [len(document)] if len(document) else [])
        builder.finalize(f"{prefix}.idx")
        return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()

    ours = bin_path(dataset).read_bytes(), idx_path(dataset).read_bytes()
    assert build(str(tmp_path / "theirs"), 0) == ours
    assert build(str(tmp_path / "changed"), -1) != ours  # the comparison can fail
    eod = load_tokenizer(tokenizer_dir).eod_id
    assert open_indexed(dataset).document(0)[-1] == eod


def test_golden_index(tmp_path: Path, dataset: str) -> None:
    """The layout, spelled out: header, lengths, pointers, documents."""
    raw = idx_path(dataset).read_bytes()
    fields = {
        "magic": raw[:9].hex(),
        "version": int.from_bytes(raw[9:17], "little"),
        "dtype_code": raw[17],
        "sequences": int.from_bytes(raw[18:26], "little"),
        "document_indices": int.from_bytes(raw[26:34], "little"),
        "documents": open_indexed(dataset).document_indices.tolist(),
    }
    assert fields == json.loads(GOLDEN.read_text())
