"""`make test-matrix`: parity, resume and conversion under each Python and Megatron-Core, and a table of what was seen.

    python tests/matrix/run.py [--all] [--only TEXT] [--checks NAME ...] [--torch 2.8.0] [--folder DIR] [--table-only]

Environments, logs and results stay in the folder (`.matrix` by default). A result stands until its cell is run again,
so the cells may be run one at a time; the table, in benchmarks/RESULTS.md, is made of all results there are. A cell
that cannot be made is a row that says why, and the exit code is 1 unless every cell that was asked for passed or pip
refused it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.matrix.cells import DEFAULT, REPO, TORCH, Cell, NoCell, all_cells, make_cell
from tests.matrix.table import write_tables

CHECKS: dict[str, tuple[str, ...]] = {
    "parity": ("tests/parity/test_training.py", "tests/parity/test_logits.py"),
    "resume": ("tests/integration/test_train_resume.py", "--kill-points", "3"),
    "convert": ("tests/parity/test_convert_megatron.py", "tests/parity/test_convert_logits.py"),
    "units": ("tests/unit/runtime", "tests/unit/model", "tests/unit/train"),
}
CHECKPOINTS = "checkpoints"


def run_check(python: Path, cell: Cell, check: str, folder: Path) -> dict[str, Any]:
    """Run one row of CHECKS in the cell. Return the counts that pytest reports, and how long it took."""
    report, log = folder / "logs" / f"{cell.name}-{check}.xml", folder / "logs" / f"{cell.name}-{check}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *CHECKS[check]]
    begin = time.monotonic()
    with log.open("w") as stream:
        subprocess.run(command, cwd=REPO, env=_environment(), stdout=stream, stderr=subprocess.STDOUT, check=False)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin), "log": str(log)}
    if not report.exists():
        return found | {"error": "pytest ended without a report"}
    suite = next(iter(ET.parse(report).getroot()))
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    return found | counts | {"failed": failed}


def run_checkpoints(pythons: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Let every cell continue the half-way checkpoint of every cell. Return reader -> writer -> what was found."""
    place = folder / CHECKPOINTS
    place.mkdir(parents=True, exist_ok=True)
    for name, python in pythons.items():
        written = _json_of(python, str(place), name)
        (place / f"{name}.json").write_text(json.dumps(written))
    writers = [name for name in pythons if "losses" in json.loads((place / f"{name}.json").read_text())]
    return {name: _json_of(python, str(place), name, "--read", *writers) for name, python in pythons.items()}


def _json_of(python: Path, *arguments: str) -> dict[str, Any]:
    command = [str(python), str(Path(__file__).with_name("checkpoints.py")), *arguments]
    done = subprocess.run(command, cwd=REPO, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def run_cell(cell: Cell, checks: list[str], folder: Path) -> Path | None:
    """Run the checks and keep their results. Return the cell's interpreter, None when it cannot be made."""
    kept = folder / "results" / f"{cell.name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results |= {"python": cell.python, "engine": cell.engine, "torch": cell.torch}
    results["date"] = datetime.date.today().isoformat()
    results.pop("refused", None)
    python: Path | None = None
    try:
        python = make_cell(cell, folder)
    except NoCell as error:
        results["refused"] = str(error)
        print(f"{cell.name}: {error}", flush=True)
    for check in checks if python else ():
        if check in CHECKS:
            results[check] = run_check(python, cell, check, folder) if python else {}
            print(f"{cell.name} {check}: {results[check]}", flush=True)
            kept.write_text(json.dumps(results, indent=1))
    kept.write_text(json.dumps(results, indent=1))
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also the cells that are not asked for by default")
    parser.add_argument("--only", default="", help="cells whose name has this text, for example mcore0.19")
    parser.add_argument("--checks", nargs="+", default=[*CHECKS, CHECKPOINTS], choices=[*CHECKS, CHECKPOINTS])
    parser.add_argument("--folder", type=Path, default=REPO / ".matrix")
    parser.add_argument("--torch", default=TORCH, help=f"default {TORCH}")
    parser.add_argument(
        "--table-only", action="store_true", help="run nothing, write the table of the results there are"
    )
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    named = [cell for cell in all_cells(asked.torch) if asked.only in cell.name]
    cells = [cell for cell in named if asked.all or (cell.python, cell.engine) in DEFAULT]
    if not cells:
        parser.error(f"no cell has {asked.only!r} in its name; --all has them all")
    if not asked.table_only:
        pythons = {cell.name: run_cell(cell, asked.checks, folder) for cell in cells}
        one_per_engine = {cell.engine: cell.name for cell in reversed(cells) if pythons[cell.name] is not None}
        made = {name: python for name in sorted(one_per_engine.values()) if (python := pythons[name]) is not None}
        if CHECKPOINTS in asked.checks:
            found = run_checkpoints(made, folder)
            (folder / "results" / f"{CHECKPOINTS}.json").write_text(json.dumps(found, indent=1))
    return 0 if write_tables(folder / "results", cells, REPO / "benchmarks" / "RESULTS.md") else 1


if __name__ == "__main__":
    sys.exit(main())
