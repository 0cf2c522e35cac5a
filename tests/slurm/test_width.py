"""32 ranks on 4 nodes, then 16: the widest run that fits here, of a very small model."""

from __future__ import annotations

import pytest

from megatron_cpt.runs.checkpoints import complete_checkpoints
from tests.slurm.conftest import Job


def test_32_ranks_train_and_save_and_16_go_on(job: Job, undisturbed: dict[int, float]) -> None:
    """TP2 x PP2 x DP8, then x DP4: the same samples, and the losses of two ranks within rounding."""
    wide = ("parallel.nodes=4", "parallel.gpus_per_node=8", "parallel.tp=2", "parallel.pp=2")
    for attempt, (ranks, layout) in enumerate(((32, wide), (16, (*wide, "parallel.gpus_per_node=4"))), 1):
        job.submit(*layout)
        job.wait_for_step(3 * attempt, attempt, seconds=600)
        (job.run.root / "STOP").touch()
        job.ended()
        newest = complete_checkpoints(job.run.checkpoints)[0][1]
        assert newest.iteration >= 3 * attempt and newest.layout["dp"] == ranks // 4, job.describe()
        assert len(list((job.run.logs / f"job-{job.job}-0").glob("rank_*.log"))) == ranks
    losses = job.losses()
    assert list(losses) == list(range(1, len(losses) + 1))  # what 32 ranks saved is where 16 went on
    assert list(losses.values()) == pytest.approx(list(undisturbed.values())[: len(losses)], rel=1e-5)
