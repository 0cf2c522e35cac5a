"""The curves of a run for its charts: read as they grow, and kept in so few points that a long run costs no more.

A curve is a list of buckets of equally many rows, each with the mean of its values and its last position. When there
are too many, neighbours are joined. So a run of any length is read once, in pieces, and held in bounded memory.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.runs.metrics import Row, finite, read_rows_in_pieces

MOST_POINTS = 1_200  # of a curve: more than a chart has pixels to show
MOST_EVENTS = 400
_NOT_A_NUMBER = float("nan")
_STEP_VALUES = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib", "global_batch_size")
_SILENT_EVENTS = frozenset({"validation", "validating"})


class Curve:
    """Values over consumed tokens and seconds since 1970.

    Attributes:
        generation: changes when points that were there before have changed: joined, or taken back by a restart.
    """

    def __init__(self) -> None:
        self.tokens, self.times, self.values = array("d"), array("d"), array("d")
        self.generation = 0
        self._rows_per_point = 1
        self._rows_in_last = 0
        self._numbers_in_last = 0

    def add(self, tokens: float, seconds: float, value: float | None) -> None:
        """Append a row; one without a number keeps its place as a gap."""
        positions = self.tokens
        if positions and tokens <= positions[-1]:
            self._take_back(tokens)
        if not self._rows_in_last or self._rows_in_last == self._rows_per_point:
            if len(positions) == MOST_POINTS:
                self._join()
            self.tokens.append(tokens)
            self.times.append(seconds)
            self.values.append(_NOT_A_NUMBER)
            self._rows_in_last = self._numbers_in_last = 0
        else:
            positions[-1], self.times[-1] = tokens, seconds
        self._rows_in_last += 1
        if value is not None:
            self._numbers_in_last += 1
            before = 0.0 if self._numbers_in_last == 1 else self.values[-1]
            self.values[-1] = before + (value - before) / self._numbers_in_last

    def _take_back(self, tokens: float) -> None:
        """Drop what a later attempt does again."""
        while self.tokens and self.tokens[-1] >= tokens:
            self.tokens.pop()
            self.times.pop()
            self.values.pop()
        self._rows_in_last = self._rows_per_point if self.tokens else 0
        self.generation += 1

    def _join(self) -> None:
        """Make one point of every two."""
        values = array("d")
        for first, second in zip(self.values[::2], self.values[1::2], strict=True):
            if first != first or second != second:  # one of them is a gap
                values.append(second if first != first else first)
            else:
                values.append((first + second) / 2)
        self.values = values
        self.tokens, self.times = self.tokens[1::2], self.times[1::2]
        self._rows_per_point *= 2
        self._rows_in_last = self._rows_per_point
        self.generation += 1

    def to_json(self, first: int) -> dict[str, Any]:
        """Return the points from `first` on; gaps are null."""
        return {
            "tokens": self.tokens[first:].tolist(),
            "times": self.times[first:].tolist(),
            "values": [None if value != value else value for value in self.values[first:]],
        }


class RunCurves:
    """All curves and events of one run, up to what its metrics held when `read` was called last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.curves: dict[str, Curve] = {}
        self.events: list[dict[str, Any]] = []
        self._start: int | None = None
        self._lock = threading.Lock()

    def read(self, known: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """Read what is new, and return what a client that has `known` lacks.

        Args:
            known: name of a curve -> (its generation, how many of its points the client has).
        """
        with self._lock:
            for rows, offset in read_rows_in_pieces(self.path, self.offset):
                if offset < self.offset:  # another file under the same name
                    self.curves, self.events, self._start = {}, [], None
                self.offset = offset
                for row in rows:
                    self._add(row)
            return {
                "curves": {name: _lacking(curve, known.get(name)) for name, curve in self.curves.items()},
                "events": self.events,
            }

    def _add(self, row: Row) -> None:
        tokens, seconds = row.get("consumed_tokens"), row.get("time")
        if not isinstance(tokens, int | float) or not isinstance(seconds, int | float):
            return
        if row.get("start") != self._start:
            if self._start is not None:
                self._note({"event": "restarted", "tokens": tokens, "time": seconds})
            self._start = row.get("start")
        for name, value in _values(row):
            if name not in self.curves:
                self.curves[name] = Curve()
            self.curves[name].add(tokens, seconds, finite(value))
        event = row.get("event")
        if event is not None and event not in _SILENT_EVENTS:
            note = {"event": str(event), "tokens": tokens, "time": seconds}
            self._note(note | {key: str(row[key])[:300] for key in ("reason", "name", "phase") if key in row})

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if len(self.events) > MOST_EVENTS:  # keep every second of the older half: its saves are many
            half = MOST_EVENTS // 2
            self.events = self.events[:half:2] + self.events[half:]


def _values(row: Row) -> Iterator[tuple[str, Any]]:
    """The curves that a row adds to, each with its value."""
    if row.get("event") == "validation":
        yield f"validation/{row.get('name')}", row.get("loss")
    elif "event" not in row:
        for name in _STEP_VALUES:
            if name in row:
                yield name, row[name]
        for group in ("loss_by_source", "loss_terms", "share_by_source"):
            for name, value in dict(row.get(group) or {}).items():
                yield f"{group}/{name}", value
        for name, value in dict(row.get("scheduled_share_by_source") or {}).items():
            yield f"share_by_source/{name} (schedule)", value


def _lacking(curve: Curve, known: tuple[int, int] | None) -> dict[str, Any]:
    """The points that the client lacks. The last one it has may have changed, so it is sent again."""
    same = known is not None and known[0] == curve.generation
    first = max(0, known[1] - 1) if same and known is not None else 0
    return {"generation": curve.generation, "first": first, **curve.to_json(first)}


class CurveStore:
    """The curves of the runs that were looked at last."""

    def __init__(self, most_runs: int = 16) -> None:
        self.most_runs = most_runs
        self._runs: OrderedDict[Path, RunCurves] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: Path) -> RunCurves:
        """Return the curves of the run whose metrics are in `path`."""
        with self._lock:
            curves = self._runs.pop(path, None) or RunCurves(path)
            self._runs[path] = curves
            while len(self._runs) > self.most_runs:
                self._runs.popitem(last=False)
            return curves
