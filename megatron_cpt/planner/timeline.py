"""When each pipeline stage computes what within one step: 1F1B, or interleaved where a stage holds several chunks.

The order of work is Megatron-Core's (Narayanan et al. 2021, arXiv:2104.04473); the times follow from it, as a stage
waits for what it depends on and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on all chunks of a stage."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Span:
    """A stage computes one chunk of one micro-batch, in one direction."""

    stage: int
    micro_batch: int
    chunk: int
    forward: bool
    start: float
    end: float


@dataclass(frozen=True)
class _Task:
    micro_batch: int
    chunk: int
    forward: bool


def timeline(stages: Sequence[StageTimes], micro_batches: int, chunks: int = 1) -> list[Span]:
    """Return every span of a step, in the order in which they end on each stage.

    With several chunks `micro_batches` must be a multiple of the number of stages, as Megatron-Core asks.
    """
    orders = [_order(stage, len(stages), micro_batches, chunks) for stage in range(len(stages))]
    ends: dict[tuple[int, _Task], float] = {}
    spans: list[Span] = []
    free, place = [0.0] * len(stages), [0] * len(stages)
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                task = order[place[stage]]
                need = _needs(task, stage, len(stages), chunks)
                if need is not None and need not in ends:
                    break
                start = max(free[stage], 0.0 if need is None else ends[need])
                seconds = (stages[stage].forward if task.forward else stages[stage].backward) / chunks
                free[stage] = ends[stage, task] = start + seconds
                spans.append(Span(stage, task.micro_batch, task.chunk, task.forward, start, start + seconds))
                place[stage] += 1
                remaining -= 1
        assert remaining < before, "a schedule that waits for itself"
    return spans


def _order(stage: int, stages: int, micro_batches: int, chunks: int) -> list[_Task]:
    """What a stage does, one after the other: warm-up, then one forward and one backward in turn, then the rest."""
    total = micro_batches * chunks
    if chunks == 1:
        warmup = min(stages - stage - 1, total)
    else:
        warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    forward = [_numbered(number, stages, chunks, forward=True) for number in range(total)]
    backward = [_numbered(number, stages, chunks, forward=False) for number in range(total)]
    turns = [task for pair in zip(forward[warmup:], backward, strict=False) for task in pair]
    return [*forward[:warmup], *turns, *backward[total - warmup :]]


def _numbered(number: int, stages: int, chunks: int, *, forward: bool) -> _Task:
    """The n-th task of a direction: groups of as many micro-batches as there are stages pass each chunk in turn."""
    if chunks == 1:
        return _Task(number, 0, forward)
    group, within = divmod(number, stages * chunks)
    chunk, position = divmod(within, stages)
    return _Task(group * stages + position, chunk if forward else chunks - 1 - chunk, forward)


def _needs(task: _Task, stage: int, stages: int, chunks: int) -> tuple[int, _Task] | None:
    """What must have ended before: the neighbour's part of the same direction, or at the turn the forward pass."""
    if task.forward:
        if stage:
            return stage - 1, task
        return None if task.chunk == 0 else (stages - 1, _Task(task.micro_batch, task.chunk - 1, forward=True))
    if stage < stages - 1:
        return stage + 1, task
    if task.chunk == chunks - 1:
        return stage, _Task(task.micro_batch, task.chunk, forward=True)
    return 0, _Task(task.micro_batch, task.chunk + 1, forward=False)
