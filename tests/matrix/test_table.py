"""What `make test-matrix` and `make test-gpu` call green: the judges can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rows import GpuRow
from tests.gpu.run import judge
from tests.matrix.cells import Cell, NoCell, find_python
from tests.matrix.table import BEGIN, END, write_tables
from tests.parity.rows import TrainRow

CELL = Cell("3.12", "0.19.2", "2.13.0")
GREEN = {"tests": 5, "failures": 0, "errors": 0, "skipped": 1, "seconds": 1}
IDENTITY = {"python": CELL.python, "engine": CELL.engine, "torch": CELL.torch, "date": "2026-11-25"}


def tables(tmp_path: Path, row: dict[str, Any] | None, pairs: dict[str, Any] | None = None) -> tuple[bool, str]:
    """Whether all was green, and the page."""
    results, page = tmp_path / "results", tmp_path / "RESULTS.md"
    results.mkdir()
    if row is not None:
        (results / f"{CELL.name}.json").write_text(json.dumps(IDENTITY | row))
    if pairs is not None:
        (results / "checkpoints.json").write_text(json.dumps(pairs))
    page.write_text(f"before\n{BEGIN}\nan old table\n{END}\nafter\n")
    return write_tables(results, [CELL], page), page.read_text()


def test_the_table_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    green, page = tables(tmp_path, {"parity": GREEN})
    assert green and page.startswith("before\n") and page.endswith("after\n") and "an old table" not in page
    assert "| 3.12 | 0.19.2 | 2.13.0 | 4 passed, 1 skipped | not run |" in page


def test_a_cell_that_pip_refuses_is_a_row_with_the_reason(tmp_path: Path) -> None:
    green, page = tables(tmp_path, {"refused": "pip refuses it"})
    assert green and "| pip refuses it |" in page


@pytest.mark.parametrize(
    "check",
    [
        GREEN | {"failures": 1},
        GREEN | {"errors": 1},
        GREEN | {"skipped": 5},
        {"error": "pytest ended without a report"},
    ],
)
def test_a_check_that_failed_or_ran_nothing_is_not_green(check: dict[str, Any], tmp_path: Path) -> None:
    assert not tables(tmp_path, {"parity": GREEN, "resume": check})[0]


def test_a_cell_without_a_result_is_not_green(tmp_path: Path) -> None:
    assert not tables(tmp_path, None)[0]


@pytest.mark.parametrize("pair", [{"difference": 1e-5, "hf_sha256": "x"}, {"error": "cannot load"}, "it failed"])
def test_a_checkpoint_that_goes_on_otherwise_is_not_green(pair: Any, tmp_path: Path) -> None:
    same = {"difference": 1e-9, "hf_sha256": "x"}
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    assert tables(tmp_path / "right", {"parity": GREEN}, {CELL.name: {CELL.name: same}})[0]
    assert not tables(tmp_path / "wrong", {"parity": GREEN}, {CELL.name: {CELL.name: pair}})[0]


def test_a_cell_that_read_nothing_is_not_green(tmp_path: Path) -> None:
    assert not tables(tmp_path, {"parity": GREEN}, {CELL.name: {"error": "it failed"}})[0]


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(NoCell, match=r"no python2\.99 on PATH"):
        find_python("2.99")


BASELINE = {"base": {"loss": [2.0, 1.0], "grad_norm": [1.0, 1.0], "tokens": [8, 8]}}


@pytest.mark.parametrize(
    ("sabotage", "change", "right"),
    [
        (None, {}, True),
        (None, {"loss": [2.0, 1.1]}, False),
        (None, {"grad_norm": [1.0, 1.1]}, False),
        (None, {"tokens": [8, 7]}, False),
        ("another_seed", {}, False),
        ("another_seed", {"loss": [2.0, 1.1]}, False),
        ("another_seed", {"loss": [2.0, 1.1], "grad_norm": [1.0, 1.1]}, True),
    ],
)
def test_a_row_of_the_gpu_is_within_its_bounds_unless_a_mistake_was_made(
    sabotage: str | None, change: dict[str, Any], right: bool
) -> None:
    row = GpuRow(TrainRow("row", 1, baseline="base", sabotage=sabotage))
    assert judge(row, {"row": BASELINE["base"] | change}, BASELINE)[2] is right


def test_a_row_that_cannot_run_says_why_and_one_that_failed_is_not_green() -> None:
    row = GpuRow(TrainRow("row", 1, baseline="base"))
    assert judge(row, {"row": {"refused": "apex is not installed"}}, BASELINE)[1:] == (
        "refused: apex is not installed",
        True,
    )
    assert judge(row, {"row": {"error": "RuntimeError"}}, BASELINE)[2] is False
