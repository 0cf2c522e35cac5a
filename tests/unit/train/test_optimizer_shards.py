"""Ranges of flattened parameters as boxes, and the trick that spares the writer a copy."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    adapt_megatron_core_to_cpu()


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_boxes_hold_the_range_in_order_and_nothing_else(data: st.DataObject, shape: list[int]) -> None:
    from megatron_cpt.train.optimizer_shards import boxes

    start = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(start, prod(shape)))
    numbers = np.arange(prod(shape)).reshape(shape)
    found = list(boxes(tuple(shape), start, end))
    cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].ravel() for box in found]
    assert np.array_equal(np.concatenate([[], *cut]), np.arange(start, end))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_view_stands_alone_on_the_same_memory(dtype: torch.dtype) -> None:
    from megatron_cpt.train.optimizer_shards import standing_alone

    buffer = torch.arange(24).to(dtype)
    view = buffer[6:18].view(3, 4)
    alone = standing_alone(view)
    assert torch.equal(alone, view) and alone.dtype == dtype
    assert alone.data_ptr() == view.data_ptr()
    assert alone.untyped_storage().size() == view.numel() * view.itemsize < view.untyped_storage().size()
    transposed = view.T
    assert standing_alone(transposed) is transposed
