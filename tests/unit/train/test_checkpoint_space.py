"""What is in the way of the next checkpoint is said once, by the rank that met it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from megatron_cpt.runs.retention import Retention
from megatron_cpt.train.checkpoint_space import CheckpointSpace


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_a_folder_is_made_where_there_is_room(root: Path) -> None:
    partial = root / "iter_0000002.partial-1"
    assert CheckpointSpace(root, Retention(1), 1000).make_room(partial) is None
    assert partial.is_dir()


@pytest.mark.parametrize("kind", ["full", "file", "gone"])
def test_what_is_in_the_way_travels_to_all_ranks_with_its_hint(root: Path, kind: str) -> None:
    if kind != "full":
        root.rmdir()
    if kind == "file":
        root.touch()
    space = CheckpointSpace(root, Retention(1), 10**18 if kind == "full" else 1000)
    refused = space.make_room(root / "iter_0000002.partial-1")
    words, hint = {
        "full": ("1,000,000,000,000,000,000 bytes", "prune"),
        "file": ("Not a directory", "writable"),
        "gone": ("No such file", "stay where it is"),
    }[kind]
    assert refused is not None and words in refused.message
    received = pickle.loads(pickle.dumps(refused))
    assert hint in received.hint and received.message == refused.message
