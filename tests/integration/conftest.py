"""Ranks to train with and what they train on, once for all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rank_pool import RankPool
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    started = RankPool()
    yield started
    started.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and the datasets `data`, `domain`, `general` and `held_out`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    for name, documents, seed in (("data", 200, 1), ("domain", 120, 1), ("general", 120, 2), ("held_out", 20, 3)):
        write_dataset(folder / name, random_documents(documents, 128, seed))
    return folder


def linked(inputs: Path, folder: Path) -> Path:
    """Return `folder` with the inputs in it, and room for the runs, configs and logs of a file's tests."""
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder
