"""Which nodes of a job must not train: from what `megatron-cpt doctor --report-dir` found on each of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.folder import RunFolder

# Checks of a machine's own hardware: their errors speak against the machine even where no other one is sound.
HARDWARE = ("GPUs", "number of GPUs", "GPU memory", "GPU memory errors", "processes on GPUs", "computation")


@dataclass(frozen=True)
class Verdict:
    """`bad`: nodes to leave out, with the reason of each. `common`: an error of all nodes, which no exchange cures."""

    bad: dict[str, str]
    common: str | None = None


def judge(reports: Path, nodes: Sequence[str]) -> Verdict:
    """Compare what was found on each of `nodes`."""
    faults = {node: _fault(reports / f"{node}.json") for node in nodes}
    bad = {node: fault for node, fault in faults.items() if fault is not None}
    if bad and len(bad) == len(nodes) and not all(name in HARDWARE for name, _ in bad.values()):
        _, text = next(iter(bad.values()))
        return Verdict({}, text)
    return Verdict({node: text for node, (_, text) in bad.items()})


def _fault(path: Path) -> tuple[str, str] | None:
    """The name of the first check that failed and a sentence about it; None for a sound node."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        failed = [check for check in report["checks"] if check["verdict"] == "error"]
    except (OSError, ValueError, KeyError, TypeError):
        return "report", "the preflight left no report: the node is dead, hangs, or does not see the run folder"
    if not failed:
        return None
    first = failed[0]
    return first["name"], f"{first['name']}: {first['detail']}" + (f" ({first['hint']})" if first.get("hint") else "")


def excluded_nodes(folder: RunFolder) -> dict[str, str]:
    """The nodes that the jobs of this run leave out, with the reasons: RUN/excluded_nodes.txt, one a line."""
    path = excluded_path(folder)
    if not path.is_file():
        return {}
    pairs = (line.partition("#") for line in path.read_text(encoding="utf-8").splitlines())
    return {node.strip(): reason.strip() for node, _, reason in pairs if node.strip()}


def excluded_path(folder: RunFolder) -> Path:
    return folder.root / "excluded_nodes.txt"


def exclude(folder: RunFolder, bad: dict[str, str]) -> None:
    """Add `bad` to the list.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    known = excluded_nodes(folder)
    lines = [f"{node}  # {' '.join(reason.split())}\n" for node, reason in bad.items() if node not in known]
    try:
        with excluded_path(folder).open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {excluded_path(folder)}: {error.strerror}", hint="is the run folder's disk full?"
        ) from error
