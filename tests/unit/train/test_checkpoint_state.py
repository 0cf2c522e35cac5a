"""What of a checkpoint is put back into a rank's process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import megatron_cpt.model  # noqa: F401  # adapts Megatron-Core to the CPU before it is imported
from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
from megatron_cpt.train import checkpoint_state
from tests.unit.model.conftest import make_config


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    init_runtime(make_config())
    yield
    shutdown_runtime()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the checkpoint of this test is from a GPU")
def test_random_states_of_a_gpu_are_not_given_to_the_generators_of_a_cpu() -> None:
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = tracker.get_states()
    torch.manual_seed(5)
    own = checkpoint_state._random_states().data
    torch.manual_seed(6)
    from_gpu = own | {"cuda": torch.zeros(16, dtype=torch.uint8), "tracker": {"state": torch.zeros(16)}}
    checkpoint_state._set_random_states(from_gpu)
    assert torch.equal(torch.get_rng_state(), own["torch"])
    assert tracker.get_states().keys() == before.keys()
    checkpoint_state._set_random_states(own | {"tracker": {"other": torch.get_rng_state()}})
    assert set(tracker.get_states()) == {"other"}  # those of the same kind of device are
    tracker.set_states(before)
