"""The index of a torch_dist checkpoint as PyTorch itself writes it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StoragePrefix

from checkpoint_convert.dcp_index import read_index


class RemembersPlans(dcp.DefaultSavePlanner):
    """Keeps the writer's prefix in the index, as Megatron-Core's planner does from the second save of a process on."""

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], dcp.Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = [_StoragePrefix("__0_")]
        return plans, metadata


def test_an_index_of_a_later_save(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, planner=RemembersPlans(), no_dist=True)
    assert list(read_index(tmp_path).state_dict_metadata) == ["weight"]


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_with_paths_as_each_version_of_python_writes_them(tmp_path: Path, module: str) -> None:
    """Python 3.13 alone calls the module of `PosixPath` `pathlib._local`."""
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert metadata.storage_meta is not None
    metadata.storage_meta.checkpoint_id = _PathOf(module)  # type: ignore[assignment]
    (tmp_path / ".metadata").write_bytes(_pickled(metadata, module))
    assert list(read_index(tmp_path).state_dict_metadata) == ["weight"]


class _PathOf:
    def __init__(self, module: str) -> None:
        self.module = module


def _pickled(value: object, module: str) -> bytes:
    """`value`, every _PathOf in it as a Python would pickle a path that calls the module so."""
    name = f"{module}\nPosixPath\n".encode()

    class Pickler(pickle._Pickler):  # the one of pure Python, which writes opcodes through `write`
        def save(self, obj: object, save_persistent_id: bool = True) -> None:
            if isinstance(obj, _PathOf):
                self.write(pickle.GLOBAL + name + pickle.MARK)
                super().save("run")
                self.write(pickle.TUPLE + pickle.REDUCE)
            else:
                super().save(obj, save_persistent_id)

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()
