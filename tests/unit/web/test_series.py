"""Curves in bounded memory: what a chart shows of a run is what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.runs.metrics import read_rows, read_rows_in_pieces
from megatron_cpt.web.series import MOST_POINTS, Curve, CurveStore, RunCurves


def curve(count: int) -> Curve:
    found = Curve()
    for i in range(1, count + 1):
        found.add(512 * i, 1e9 + i, float(i))
    return found


def test_few_rows_are_shown_as_they_are() -> None:
    assert curve(3).to_json(0) == {
        "tokens": [512.0, 1024.0, 1536.0],
        "times": [1e9 + 1, 1e9 + 2, 1e9 + 3],
        "values": [1.0, 2.0, 3.0],
    }


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS + 7, 100_000])
def test_many_rows_are_means_of_neighbours_in_few_points(count: int) -> None:
    found = curve(count)
    assert MOST_POINTS // 2 <= len(found.values) <= MOST_POINTS
    assert (found.tokens[-1], found.times[-1]) == (512.0 * count, 1e9 + count)
    width = (found.tokens[1] - found.tokens[0]) / 512
    for tokens, value in zip(found.tokens[:-1], found.values[:-1], strict=True):
        last = tokens / 512
        assert value == pytest.approx(last - (width - 1) / 2)


def test_a_gap_is_null_and_does_not_pull_its_neighbours() -> None:
    found = Curve()
    for i in range(1, 2 * MOST_POINTS + 1):
        found.add(i, i, None if i <= 2 or i == 8 else 5.0)
    values = found.to_json(0)["values"]
    assert values[0] is None and set(values[1:]) == {5.0}


def test_what_a_restart_does_again_is_taken_back() -> None:
    found = curve(60)
    before = found.generation
    for i in range(31, 101):
        found.add(512 * i, 2e9 + i, -1.0)
    assert found.generation > before
    assert found.tokens.tolist() == [512.0 * i for i in range(1, 101)]
    assert found.values.tolist() == [float(i) for i in range(1, 31)] + [-1.0] * 70


def write(path: Path, iterations: range, **values: object) -> None:
    with path.open("a") as file:
        for i in iterations:
            row = {"start": 1, "time": i, "iteration": i, "consumed_tokens": 10 * i, "loss": float(i)} | values
            file.write(json.dumps(row) + "\n")


def test_a_client_gets_what_it_lacks_and_ends_with_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = RunCurves(path)
    assert curves.read({}) == {"curves": {}, "events": []}
    write(path, range(1, 4))
    first = curves.read({})["curves"]["loss"]
    assert (first["first"], first["values"]) == (0, [1.0, 2.0, 3.0])
    write(path, range(4, 6))
    news = curves.read({"loss": (first["generation"], 3)})["curves"]["loss"]
    assert (news["first"], news["values"]) == (2, [3.0, 4.0, 5.0])
    unknown = curves.read({"loss": (first["generation"] + 9, 3)})["curves"]["loss"]
    assert (unknown["first"], unknown["values"]) == (0, [1.0, 2.0, 3.0, 4.0, 5.0])


def test_half_a_line_waits_and_another_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = RunCurves(path)
    write(path, range(1, 3))
    with path.open("a") as file:
        file.write('{"start": 1, "time": 3, "consumed_tokens": 30, "loss": 3')
    assert curves.read({})["curves"]["loss"]["values"] == [1.0, 2.0]
    with path.open("a") as file:
        file.write(".5}\nnot json\n[1]\n")
    assert curves.read({})["curves"]["loss"]["values"] == [1.0, 2.0, 3.5]
    path.unlink()
    write(path, range(7, 8))
    assert curves.read({})["curves"]["loss"]["values"] == [7.0]


def test_values_that_are_no_numbers_and_rows_of_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2), loss="NaN", loss_by_source={"a": 1.0, "b": "inf"})
    with path.open("a") as file:
        file.write('{}\n{"consumed_tokens": "x", "time": 1}\n{"consumed_tokens": 20, "time": null, "loss": 1}\n')
    found = RunCurves(path).read({})["curves"]
    assert found["loss"]["values"] == [None] and found["loss_by_source/b"]["values"] == [None]


def test_events_are_few_and_a_restart_is_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3_000), event="saved", reason="x" * 1_000)
    write(path, range(3_000, 3_001), start=2)
    events = RunCurves(path).read({})["events"]
    assert len(events) <= 400 and events[-1]["event"] == "restarted" and len(events[0]["reason"]) == 300


def test_the_store_forgets_runs_that_nobody_looks_at(tmp_path: Path) -> None:
    store = CurveStore(most_runs=2)
    first = store.of(tmp_path / "a")
    assert store.of(tmp_path / "a") is first
    store.of(tmp_path / "b")
    store.of(tmp_path / "c")
    assert store.of(tmp_path / "a") is not first


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_rows_in_pieces_are_the_rows(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 50))
    pieces = list(read_rows_in_pieces(path, 0, piece_bytes))
    assert [row for rows, _ in pieces for row in rows] == read_rows(path)[0]
    assert pieces[-1][1] == path.stat().st_size
