from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.load import build_config
from megatron_cpt.runs.marker import Marker
from megatron_cpt.runs.retention import Retention


def saved(iteration: int) -> tuple[Path, Marker]:
    return Path(f"iter_{iteration:07d}"), Marker(iteration, 100 * iteration, {}, {}, "", 1, "", {})


def kept(retention: Retention, best: int | None = None) -> list[int]:
    checkpoints = [saved(iteration) for iteration in range(10, 0, -1)]
    gone = retention.removable(checkpoints, best)
    return [marker.iteration for path, marker in reversed(checkpoints) if path not in gone]


def test_the_newest_the_milestones_and_the_best_stay() -> None:
    assert kept(Retention(2)) == [9, 10]
    assert kept(Retention(3), best=4) == [4, 8, 9, 10]
    assert kept(Retention(2, 300)) == [3, 6, 9, 10]
    assert kept(Retention(2, 250)) == [3, 5, 8, 9, 10]  # the first at or after each multiple
    assert kept(Retention(99)) == list(range(1, 11))
    assert kept(Retention(1, phase_ends=(250, 700, 5000))) == [3, 7, 10]  # the first at or after each end


def test_the_config_says_what_stays() -> None:
    raw = {"job_name": "t", "model": {"init_from": "m"}, "checkpoint": {"keep_last": 1, "keep_every": 500}}
    assert Retention.from_config(build_config(raw)) == Retention(1, 500)
