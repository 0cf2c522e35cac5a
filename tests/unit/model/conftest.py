"""One process, one rank: the groups of a single-rank layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime

adapt_megatron_core_to_cpu()  # before the test modules import Megatron-Core

MakeConfig = Callable[..., RunConfig]


def make_config(init_from: str | Path = "random", **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "job_name": "unit",
        "model": {"init_from": str(init_from), **sections.pop("model", {})},
        "batch": {"seq_length": 32, "global_batch_size": 4, **sections.pop("batch", {})},
        "precision": {"dtype": "fp32", **sections.pop("precision", {})},
        **sections,
    }
    return build_config(tree)


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    init_runtime(make_config())
    yield
    shutdown_runtime()
