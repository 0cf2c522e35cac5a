"""The index of a torch_dist checkpoint as PyTorch itself writes it."""

from __future__ import annotations

from pathlib import Path

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
