"""Rows of metrics.jsonl: read from an offset on, torn lines skipped, the later attempt counts."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.runs.metrics import read_metrics, read_rows
from megatron_cpt.train.metrics import MetricsFile


def write_steps(path: Path, attempt: int, iterations: range) -> None:
    metrics = MetricsFile(path, attempt)
    for n in iterations:
        metrics.write(iteration=n, consumed_tokens=100 * n, loss=1.0)
    metrics.close()


def test_a_torn_line_is_skipped_and_the_later_attempt_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, range(1, 4))
    with path.open("a") as file:
        file.write('{"iteration": 4, "los')
    write_steps(path, 2, range(3, 5))
    assert [(row["iteration"], row["start"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    MetricsFile(path, 2).write(iteration=5, loss=float("nan"))
    assert read_metrics(path)[-1]["loss"] == "nan"


def test_reading_on_from_an_offset_gives_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == ([], 0)
    write_steps(path, 1, range(1, 4))
    rows, offset = read_rows(path)
    assert [row["iteration"] for row in rows] == [1, 2, 3] and offset == path.stat().st_size
    assert read_rows(path, offset) == ([], offset)
    with path.open("a") as file:  # a row that is being written is not there yet
        file.write('{"iteration": 4}')
    assert read_rows(path, offset) == ([], offset)
    with path.open("a") as file:
        file.write("\n")
    rows, end = read_rows(path, offset)
    assert [row["iteration"] for row in rows] == [4] and end == path.stat().st_size
    path.write_text('{"iteration": 1}\n')  # the run began anew: a shorter file is another one
    assert [row["iteration"] for row in read_rows(path, end)[0]] == [1]
