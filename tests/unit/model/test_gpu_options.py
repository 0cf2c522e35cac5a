"""Levers that need a GPU or TransformerEngine are refused with the reason where there is none."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.errors import ConfigError
from megatron_cpt.model.gpu_options import fp8_settings, optimizer_settings
from tests.unit.model.conftest import make_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_nothing_asked_nothing_set() -> None:
    assert fp8_settings(make_config()) == {} == optimizer_settings(make_config())


def test_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs TransformerEngine and CUDA"):
        fp8_settings(make_config(precision={"dtype": "bf16", "fp8": "hybrid"}))


def test_offload_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no GPU here"):
        optimizer_settings(make_config(optimizer={"cpu_offload_ratio": 0.5}))


def test_narrow_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs TransformerEngine's optimizer"):
        optimizer_settings(make_config(optimizer={"moments_dtype": "bf16"}))
