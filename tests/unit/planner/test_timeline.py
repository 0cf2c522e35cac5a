"""The timeline of a step: each stage does everything once, waits for what it needs, takes as long as theory says."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from megatron_cpt.planner.timeline import StageTimes, timeline


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 2), (4, 8), (4, 2), (8, 32)])
def test_1f1b_takes_a_bubble_of_one_pass_per_other_stage(stages: int, micro_batches: int) -> None:
    spans = timeline([StageTimes(1.0, 2.0)] * stages, micro_batches)
    assert max(span.end for span in spans) == pytest.approx((micro_batches + stages - 1) * 3.0)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 5)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages: int, micro_batches: int, chunks: int) -> None:
    spans = timeline([StageTimes(1.0, 2.0)] * stages, micro_batches, chunks)
    assert max(span.end for span in spans) == pytest.approx(micro_batches * 3.0 + (stages - 1) * 3.0 / chunks)


def test_the_slowest_stage_sets_the_pace() -> None:
    spans = timeline([StageTimes(1.0, 2.0), StageTimes(1.5, 3.0)], 10)
    assert max(span.end for span in spans) == pytest.approx(10 * 4.5 + 3.0)


@pytest.mark.parametrize("chunks", [1, 3])
def test_each_task_is_done_once_and_no_stage_does_two_at_a_time(chunks: int) -> None:
    spans = timeline([StageTimes(1.0, 2.0)] * 4, 8, chunks)
    tasks = {(span.stage, span.micro_batch, span.chunk, span.forward) for span in spans}
    assert len(tasks) == len(spans) == 4 * 8 * chunks * 2
    by_stage = defaultdict(list)
    for span in spans:
        by_stage[span.stage].append((span.start, span.end))
    for times in by_stage.values():
        times.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))


def test_activations_in_flight_are_what_the_memory_model_counts() -> None:
    """Stage r of p holds at most p - r micro-batches whose backward pass has not ended."""
    spans = timeline([StageTimes(1.0, 2.0)] * 4, 8)
    for stage in range(4):
        mine = [span for span in spans if span.stage == stage]
        held = [
            sum(s.forward and s.start <= moment.start for s in mine)
            - sum(not s.forward and s.end <= moment.start for s in mine)
            for moment in mine
        ]
        assert max(held) == 4 - stage
