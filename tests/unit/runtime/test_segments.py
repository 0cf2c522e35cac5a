"""How torch's allocator on a GPU is asked to behave."""

import os

import pytest

from megatron_cpt.runtime.distributed import _let_segments_grow

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.mark.parametrize("chosen", NAMES)
def test_segments_grow_unless_the_user_chose_otherwise(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what the function sets
        monkeypatch.delenv(name)
    _let_segments_grow()
    assert os.environ[NAMES[0]] == "expandable_segments:True"

    monkeypatch.delenv(NAMES[0])
    monkeypatch.setenv(chosen, "max_split_size_mb:128")
    _let_segments_grow()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == {chosen: "max_split_size_mb:128"}
