"""The shards of all ranks must make whole tensors, each element written once. Exact, on rectangles of any size.

Megatron-Core's own check looks at grids only, and a hole in a checkpoint is not noticed when it is loaded: the weight
stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_cpt.dry_run.shards import Shard, volume


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor, and the rank that writes it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int

    def end(self, axis: int) -> int:
        return self.offset[axis] + self.shape[axis]

    def meets(self, other: Box) -> bool:
        """Whether the two have an element in common."""
        return all(
            a < b + n and b < a + m
            for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )


@dataclass
class _Tensor:
    dtype: str
    whole: tuple[int, ...]
    first_rank: int
    boxes: list[Box] = field(default_factory=list)


class Tiling:
    """The shards of the ranks that were added so far, by tensor."""

    def __init__(self) -> None:
        self._tensors: dict[str, _Tensor] = {}
        self._different: list[str] = []
        self.shards = 0  # that are written

    def add(self, rank: int, shards: Iterable[Shard]) -> None:
        for shard in shards:
            tensor = self._tensors.setdefault(shard.key, _Tensor(shard.dtype, shard.whole, rank))
            if (shard.dtype, shard.whole) != (tensor.dtype, tensor.whole):
                self._different.append(
                    f"{shard.key}: rank {rank} saves a part of {shard.dtype} {shard.whole}, rank {tensor.first_rank} "
                    f"of {tensor.dtype} {tensor.whole}"
                )
            elif shard.writes:
                tensor.boxes.append(Box(shard.offset, shard.shape, rank))
                self.shards += 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor, objects aside."""
        return {key: tensor.whole for key, tensor in self._tensors.items() if tensor.dtype != "object"}

    def elements(self, key: str, rows: int | None = None) -> int:
        """Return how many elements of a tensor the ranks write, in its first `rows` rows where that is given."""
        total = 0
        for box in self._tensors[key].boxes:
            first, *rest = box.shape
            if rows is not None:
                first = max(min(box.end(0), rows) - box.offset[0], 0)
            total += first * volume(tuple(rest))
        return total

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence for each tensor and kind; empty when every element is written once."""
        found = list(dict.fromkeys(self._different))
        for key, tensor in self._tensors.items():
            found += (f"{key}: {fault}" for fault in _faults(tensor))
        return found


def _faults(tensor: _Tensor) -> Iterator[str]:
    outside = [box for box in tensor.boxes if not _within(box, tensor.whole)]
    if outside:
        yield f"rank {outside[0].rank} writes {_where(outside[0])}, outside of the whole {tensor.whole}"
        return
    pair = overlap(tensor.boxes)
    if pair is not None:
        yield f"ranks {pair[0].rank} and {pair[1].rank} both write elements of {_where(pair[1])}"
    missing = volume(tensor.whole) - sum(volume(box.shape) for box in tensor.boxes)
    if missing > 0:
        yield f"{missing:,} of {volume(tensor.whole):,} elements are written by no rank{_first_hole(tensor)}"


def _within(box: Box, whole: tuple[int, ...]) -> bool:
    return all(start >= 0 and start + size <= n for start, size, n in zip(box.offset, box.shape, whole, strict=True))


def _where(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in zip(box.offset, box.shape, strict=True)) + "]"


def _first_hole(tensor: _Tensor) -> str:
    """Where along the first axis (for a stacked tensor: in which layer) the first element is missing."""
    slab = volume(tensor.whole[1:])
    covered = [0] * (tensor.whole[0] + 1)  # differences from one index to the next
    for box in tensor.boxes:
        covered[box.offset[0]] += volume(box.shape[1:])
        covered[box.end(0)] -= volume(box.shape[1:])
    here = 0
    for index, change in enumerate(covered[:-1]):
        here += change
        if here < slab:
            return f", the first of them at index {index} of the first axis"
    return ""


def overlap(boxes: list[Box], axis: int = 0) -> tuple[Box, Box] | None:
    """Return two boxes that have an element in common, None when there are none.

    Boxes are sorted along an axis and cut into runs between which nothing reaches across; boxes of a run that cover the
    same interval differ along the next axis only.
    """
    for run in _runs(boxes, axis):
        if len(run) < 2:
            continue
        if any(box.offset[axis] != run[0].offset[axis] or box.shape[axis] != run[0].shape[axis] for box in run):
            pair = _overlap_of_unequal(run, axis)
        elif axis + 1 == len(run[0].offset):
            pair = run[0], run[1]
        else:
            pair = overlap(run, axis + 1)
        if pair is not None:
            return pair
    return None


def _runs(boxes: list[Box], axis: int) -> Iterator[list[Box]]:
    run: list[Box] = []
    reach = 0
    for box in sorted((box for box in boxes if volume(box.shape)), key=lambda box: box.offset[axis]):
        if run and box.offset[axis] >= reach:
            yield run
            run = []
        reach = max(reach, box.end(axis)) if run else box.end(axis)
        run.append(box)
    if run:
        yield run


def _overlap_of_unequal(run: list[Box], axis: int) -> tuple[Box, Box] | None:
    active: list[Box] = []
    for box in run:
        active = [other for other in active if other.end(axis) > box.offset[axis]]
        for other in active:
            if other.meets(box):
                return other, box
        active.append(box)
    return None
