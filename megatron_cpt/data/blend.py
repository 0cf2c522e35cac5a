"""Which source gives sample n: a pure function of (seed, weights, n), closed form, without arrays.

Sample n stands at the point (n * A + B) mod M of a circle of M = 2**48 points, A/M the golden ratio and B from
the seed. Each source owns an arc as long as its share. The golden ratio spreads any run of consecutive points
evenly (three-distance theorem), so every source is within a few samples of its exact share at every n.
How often a source was drawn among samples [first, last) is a difference of two floor sums and costs
O(log M), so a position 100 million samples away is computed in microseconds.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_POINTS = 2**48
_STRIDE = round(_POINTS * (math.sqrt(5) - 1) / 2) | 1  # odd, so the orbit visits every point


def floor_sum(count: int, modulus: int, stride: int, offset: int) -> int:
    """sum of floor((stride * i + offset) / modulus) for i in [0, count), in O(log modulus); exact."""
    total = 0
    while count > 0:
        whole_stride, stride = divmod(stride, modulus)
        whole_offset, offset = divmod(offset, modulus)
        total += whole_stride * (count * (count - 1) // 2) + whole_offset * count
        top = stride * count + offset
        # Count lattice points under the line by columns instead of rows: Euclid's algorithm on the slope.
        count, offset = divmod(top, modulus)
        modulus, stride = stride, modulus
        if modulus == 0:
            break
    return total


@dataclass(frozen=True)
class Blend:
    """The sources' shares and a seed. Build it with `build_blend`."""

    names: tuple[str, ...]
    arc_ends: tuple[int, ...]  # ascending, the last is _POINTS
    offset: int

    def source_of(self, sample: int) -> str:
        """Name of the source that gives sample number `sample`."""
        return self.names[bisect_right(self.arc_ends, (sample * _STRIDE + self.offset) % _POINTS)]

    def sources(self, first: int, last: int) -> Iterator[str]:
        """Source of each sample in [first, last)."""
        return (self.source_of(sample) for sample in range(first, last))

    def counts(self, first: int, last: int) -> dict[str, int]:
        """How many samples of [first, last) each source gives."""
        below = [self._drawn_below(last, end) - self._drawn_below(first, end) for end in self.arc_ends]
        return {name: end - start for name, start, end in zip(self.names, [0, *below], below, strict=False)}

    def _drawn_below(self, samples: int, end: int) -> int:
        """How many of the first `samples` samples stand at a point below `end`."""
        whole = floor_sum(samples, _POINTS, _STRIDE, self.offset)
        return whole - floor_sum(samples, _POINTS, _STRIDE, self.offset - end)


def build_blend(weights: Mapping[str, float], seed: int) -> Blend:
    """A blend in which each source's share of samples is proportional to its weight (> 0)."""
    assert weights and all(weight > 0 for weight in weights.values())
    total, running, ends = math.fsum(weights.values()), 0.0, []
    for weight in weights.values():
        running += weight
        ends.append(round(running / total * _POINTS))
    ends[-1] = _POINTS
    digest = hashlib.sha256(f"blend {seed}".encode()).digest()
    return Blend(tuple(weights), tuple(ends), int.from_bytes(digest[:6], "big"))
