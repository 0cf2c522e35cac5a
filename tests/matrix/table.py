"""The tables of `make test-matrix`, written between two marks of benchmarks/RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.matrix.cells import Cell

BEGIN, END = "<!-- test-matrix: begin -->", "<!-- test-matrix: end -->"
CHECKS = ("parity", "resume", "convert", "units")
LOSS_BOUND = 1e-6  # of the second half of a run that another version began


def write_tables(results: Path, cells: Sequence[Cell], page: Path) -> bool:
    """Write what `results` holds into `page`. Return whether each of `cells` passed all that was run, or is refused."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("python*.json"))]
    crossed = results / "checkpoints.json"
    pairs: dict[str, dict[str, Any]] = json.loads(crossed.read_text()) if crossed.exists() else {}
    lines = [*_cell_table(found), "", *_checkpoint_table(pairs)]
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
    print("\n".join(lines))
    names = {cell.name for cell in cells}
    asked = [row for row in found if Cell(row["python"], row["engine"], row["torch"]).name in names]
    readers = [row for name, row in pairs.items() if name in names]
    return (
        len(asked) == len(names)
        and all("refused" in row or all(passed(row[c]) for c in CHECKS if c in row) for row in asked)
        and all(same(pair) for row in readers for pair in row.values())
    )


def passed(check: dict[str, Any]) -> bool:
    """Whether tests were run, and none failed."""
    return "error" not in check and check["failures"] == check["errors"] == 0 and check["tests"] > check["skipped"]


def same(pair: Any) -> bool:
    """Whether a reader went on from a writer's checkpoint with the writer's losses."""
    return isinstance(pair, dict) and "error" not in pair and bool(pair["difference"] <= LOSS_BOUND)


def _cell_table(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| Python | Megatron-Core | torch | " + " | ".join(CHECKS) + " | date |",
        "|" + "---|" * (len(CHECKS) + 4),
    ]
    for row in found:
        seen = (
            [row["refused"], *[""] * (len(CHECKS) - 1)] if "refused" in row else [_counts(row.get(c)) for c in CHECKS]
        )
        lines.append(
            f"| {row['python']} | {row['engine']} | {row['torch']} | {' | '.join(seen)} | {row.get('date', '')} |"
        )
    return lines


def _counts(check: dict[str, Any] | None) -> str:
    if check is None:
        return "not run"
    if "error" in check:
        return f"**{check['error']}**"
    ran = check["tests"] - check["skipped"]
    failed = check["failures"] + check["errors"]
    skipped = f", {check['skipped']} skipped" if check["skipped"] else ""
    return f"**{failed} of {ran} failed**{skipped}" if failed else f"{ran} passed{skipped}"


def _checkpoint_table(pairs: dict[str, dict[str, Any]]) -> list[str]:
    if not pairs:
        return ["Checkpoints across versions: not run."]
    writers = list(pairs)  # each reads what each of them wrote
    lines = ["| read by, written by | " + " | ".join(writers) + " |", "|" + "---|" * (len(writers) + 1)]
    for reader, row in pairs.items():
        lines.append(f"| {reader} | " + " | ".join(_pair(row.get(writer)) for writer in writers) + " |")
    digests = {
        writer: {row[writer].get("hf_sha256") for row in pairs.values() if same(row.get(writer))} for writer in writers
    }
    equal = all(len(found) == 1 for found in digests.values())
    verdict = "the same bytes" if equal else "**not the same bytes**"
    return [*lines, "", f"Converted to Hugging Face by every reader, the checkpoint of each writer gives {verdict}."]


def _pair(pair: Any) -> str:
    if not isinstance(pair, dict):
        return "not run"
    return f"**{pair['error'][:80]}**" if "error" in pair else f"{pair['difference']:.0e}"
