"""Seconds by part, in the order in which the parts happen."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class LapClock:
    """Of one step, or of a start: `lap(part)` gives the time since the last lap to `part`."""

    seconds: dict[str, float] = field(default_factory=dict)
    _mark: float = field(default_factory=time.perf_counter)

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._mark
        self._mark = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def rounded(self) -> dict[str, float]:
        return {part: round(seconds, 4) for part, seconds in self.seconds.items()}
