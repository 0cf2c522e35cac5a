"""The attention back ends against each other, and documents against being alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.budget import BatchSize
from megatron_cpt.config.phases import phase_at
from megatron_cpt.corpus.dataset.manifest import read_manifest, write_manifest
from megatron_cpt.data.batches import open_batches
from megatron_cpt.data.datasets import check_datasets, plan_sources
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.micro_batch import document_ids
from megatron_cpt.errors import ConfigError
from megatron_cpt.model.attention import Span, causal_spans, document_starts
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import load_hf_weights
from megatron_cpt.model.spec import resolve_attention
from tests.parity.tiny_models import save_tiny_model
from tests.synthetic_data import random_documents, write_dataset
from tests.unit.model.conftest import make_config

LENGTHS = [[9, 1, 22], [31, 1], [32]]  # documents of three samples of 32 tokens


def test_document_starts() -> None:
    ids = torch.tensor([[5, 5, 7, 7], [1, 2, 3, 3]])
    assert document_starts(ids).tolist() == [[0, 0], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_spans_cover_every_query_once() -> None:
    starts = document_starts(torch.tensor([[0] * 3 + [1] * 5, [0] * 8]))
    assert causal_spans(2, 6, starts, 8, 2) == [Span(0, 2, 3, 0), Span(0, 3, 6, 3), Span(1, 2, 6, 0)]
    assert causal_spans(2, 6, None, 8, 2) == [Span(None, 2, 6, 0)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("base", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("attention", ["sdpa", "block_causal", "unfused"])
def test_documents_in_one_sample_equal_documents_alone(model_dir: Path, attention: str) -> None:
    arch = read_architecture(model_dir)
    config = make_config(model_dir, model={"attention": attention, "document_attention": True})
    model = build_model(config, arch)[0].eval()
    load_hf_weights([model], model_dir, arch)
    tokens = torch.randint(0, arch.vocab_size, (3, 32), generator=torch.Generator().manual_seed(3))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS])
    positions = torch.arange(32).expand(3, -1)
    with torch.no_grad():
        packed = model(tokens, positions, document_starts(ids))
        mixed = model(tokens, positions, None)
        for sample, lengths in enumerate(LENGTHS):
            begin = 0
            for length in lengths:
                part = slice(begin, begin + length)
                alone = model(tokens[sample : sample + 1, part], positions[:1, :length], None)
                assert (packed[sample, part] - alone[0]).abs().max() < 1e-6
                if begin:  # negative control: without the boundaries the later documents see the earlier ones
                    assert (mixed[sample, part] - alone[0]).abs().max() > 1e-3
                begin += length


def test_gradients_of_packed_documents_equal_those_apart(model_dir: Path) -> None:
    arch = read_architecture(model_dir)
    config = make_config(model_dir, model={"document_attention": True})
    tokens = torch.randint(0, arch.vocab_size, (1, 32), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(32)[None]

    def gradient(parts: list[slice], starts: torch.Tensor | None) -> torch.Tensor:
        model = build_model(config, arch)[0]
        load_hf_weights([model], model_dir, arch)
        for part in parts:
            length = part.stop - part.start
            model(tokens[:, part], positions[:, :length], starts, labels=tokens[:, part]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    packed = gradient([slice(0, 32)], torch.tensor([[0, 0], [0, 11]]))
    apart = gradient([slice(0, 11), slice(11, 32)], None)
    mixed = gradient([slice(0, 32)], None)
    assert (packed - apart).norm() / apart.norm() < 1e-5
    assert (mixed - apart).norm() / apart.norm() > 1e-2


def test_no_source_sees_an_earlier_document_whatever_its_eod(model_dir: Path, tmp_path: Path) -> None:
    """From the bytes of two sources, whose documents end with 0 and with 3, to logits."""
    prefixes = []
    for name, eod in (("a", 0), ("b", 3)):
        bodies = [np.where(ids[:-1] == eod, 7, ids[:-1]) for ids in random_documents(40, 100, seed=eod, longest=12)]
        prefix = write_dataset(tmp_path / name, [np.append(ids, eod) for ids in bodies])
        manifest = read_manifest(prefix)
        write_manifest(prefix, replace(manifest, tokenizer=replace(manifest.tokenizer, eod_id=eod)))
        prefixes.append({"name": name, "prefix": str(prefix), "weight": 1})
    arch = read_architecture(model_dir)
    config = make_config(
        model_dir,
        model={"document_attention": True},
        data={"train": prefixes, "max_epochs": 99},
        budget={"train_tokens": 1024, "warmup_tokens": 0},
    )
    datasets = check_datasets(config, replace(arch, vocab_size=max(arch.vocab_size, 128)), tmp_path)
    ledger = Ledger().with_sources(datasets.manifests(), config.batch.seq_length)
    stream = open_batches(config, datasets, ledger, plan_sources(config, datasets, ledger), tmp_path / "cache")
    (batch,) = stream.micro_batches(
        stream.plan_step(ledger, replace(phase_at(config), batch_size=BatchSize(8))), 8, 0, 1
    )
    model = build_model(config, arch)[0].eval()
    load_hf_weights([model], model_dir, arch)

    def change_in_last_document(row: int, ids: torch.Tensor) -> float:
        """How much its logits move when all documents before it become other ones, by the boundaries `ids`."""
        tokens, eod = batch["tokens"][row : row + 1], (0, 3)[int(batch["source"][row])]
        last = int((tokens[0, :-1] == eod).nonzero()[-1]) + 1
        other = tokens.clone()
        other[0, :last] = torch.where(tokens[0, :last] == eod, eod, 50)
        positions, starts = torch.arange(tokens.shape[1])[None], document_starts(ids[row : row + 1])
        with torch.no_grad():
            moved = model(tokens, positions, starts) - model(other, positions, starts)
        return float(moved[0, last:].abs().max())

    by_first_source = document_ids(batch["tokens"], 0)
    for row, source in enumerate(batch["source"].tolist()):
        assert change_in_last_document(row, batch["document_ids"]) < 1e-6
        if source == 1:  # negative control: with the first source's EOD for all, the second one leaks
            assert change_in_last_document(row, by_first_source) > 1e-4
    assert set(batch["source"].tolist()) == {0, 1}


def test_te_without_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert resolve_attention("auto") == "block_causal"
    with pytest.raises(ConfigError, match="TransformerEngine needs CUDA"):
        resolve_attention("te")
