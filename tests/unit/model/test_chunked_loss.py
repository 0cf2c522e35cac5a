"""The loss a chunk at a time: the same numbers, from logits that are never whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.loss_chunk import chunk_of, loss_chunk_tokens
from megatron_cpt.errors import ConfigError
from megatron_cpt.model.build import build_model
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config, single_rank  # noqa: F401 - a fixture

CHUNK = {"recompute": {"loss_chunk_tokens": 20}}  # of 2 x 32 tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("odd_vocab", tmp_path_factory.mktemp("models"))


def losses_and_gradients(model_dir: Path, dtype: torch.dtype, **sections: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The losses [b, s], the gradient of each parameter, and the most logits that there were at once."""
    (model,) = build_model(make_config(model_dir, **sections), read_architecture(model_dir))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.to(dtype)
    largest = 0

    def watch(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output[0].numel())

    model.output_layer.register_forward_hook(watch)
    tokens = torch.randint(0, 515, (2, 33), generator=generator)
    positions = torch.arange(32).expand(2, -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    weights = torch.rand(losses.shape, generator=generator)  # any function of the losses, and some tokens do not count
    weights[0, :7] = 0
    (losses * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses.detach(), gradients, largest


def test_losses_and_gradients_are_those_of_whole_logits(model_dir: Path) -> None:
    whole, expected, all_logits = losses_and_gradients(model_dir, torch.float32)
    chunked, found, some_logits = losses_and_gradients(model_dir, torch.float32, **CHUNK)
    assert all_logits == 64 * 515 and some_logits == 20 * 515
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


def test_the_gradient_of_the_output_layer_is_summed_in_fp32(model_dir: Path) -> None:
    """In bf16 it is as near to the fp32 one as that of whole logits; a sum of rounded parts would be farther."""
    name = "output_layer.weight"
    exact = losses_and_gradients(model_dir, torch.float32)[1][name]
    whole, one_by_one = (
        losses_and_gradients(model_dir, torch.bfloat16, recompute={"loss_chunk_tokens": tokens})[1][name]
        for tokens in (None, 2)
    )
    errors = [float((gradient.float() - exact).norm() / exact.norm()) for gradient in (whole, one_by_one)]
    assert one_by_one.dtype == torch.bfloat16 and 0 < errors[1] < 1.02 * errors[0]


def test_auto_takes_a_chunk_where_whole_logits_are_a_burden() -> None:
    assert chunk_of("auto", 4096, 49152) is None  # 0.75 GiB in fp32
    assert chunk_of("auto", 32768, 152064 / 8) == 4096  # 2.3 GiB
    assert chunk_of("auto", 32768, 152064) == 512
    assert chunk_of("auto", 1024, 2**20) == 128
    assert chunk_of(None, 10**6, 10**6) is None
    assert chunk_of(512, 512, 10) is None and chunk_of(512, 513, 10) == 512


def test_the_divergence_keeps_whole_logits(model_dir: Path) -> None:
    arch, kl = read_architecture(model_dir), {"kl": {"weight": 1.0}}
    assert loss_chunk_tokens(make_config(model_dir, **CHUNK), arch) == 20
    assert loss_chunk_tokens(make_config(model_dir, forgetting=kl), arch) is None
    with pytest.raises(ConfigError, match=r"recompute.loss_chunk_tokens = 20: forgetting.kl compares whole logits"):
        derive(make_config(model_dir, **CHUNK, forgetting=kl), arch)
