"""The attention back ends against each other, and documents against being alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.errors import ConfigError
from megatron_cpt.model.attention import Span, causal_spans, document_starts
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import load_hf_weights
from megatron_cpt.model.spec import resolve_attention
from tests.parity.tiny_models import save_tiny_model
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


def test_te_without_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert resolve_attention("auto") == "block_causal"
    with pytest.raises(ConfigError, match="TransformerEngine needs CUDA"):
        resolve_attention("te")
