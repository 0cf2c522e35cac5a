"""What the folder of a run holds, as JSON: the command line prints it and other programs read it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cpt.runs.checkpoints import SavedCheckpoint, faults, list_checkpoints, read_best
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.marker import Marker
from megatron_cpt.runs.retention import Retention


def checkpoint_json(path: Path, marker: Marker) -> dict[str, Any]:
    """A complete checkpoint in a few words."""
    return {
        "path": str(path),
        "iteration": marker.iteration,
        "consumed_tokens": marker.consumed_tokens,
        "created": marker.created,
        "bytes": marker.total_bytes,
    }


def checkpoints_json(folder: RunFolder, *, verify: bool = False) -> list[dict[str, Any]]:
    """Every checkpoint of a run, oldest first; with `verify` its files are compared with its marker."""
    best = read_best(folder.checkpoints)
    best_iteration = best["iteration"] if best else None
    return [
        _checkpoint_row(checkpoint, verify, checkpoint.iteration == best_iteration)
        for checkpoint in list_checkpoints(folder.checkpoints)
    ]


def _checkpoint_row(checkpoint: SavedCheckpoint, verify: bool, best: bool) -> dict[str, Any]:
    marker, problem = checkpoint.marker, checkpoint.problem
    found = faults(checkpoint.path, marker) if marker is not None and verify else []
    return {
        "path": str(checkpoint.path),
        "iteration": checkpoint.iteration,
        "complete": marker is not None,
        "consumed_tokens": marker.consumed_tokens if marker else None,
        "bytes": marker.total_bytes if marker else None,
        "created": marker.created if marker else None,
        "layout": marker.layout if marker else None,
        "validation": marker.validation if marker else {},
        "best": best,
        "faults": [problem.message] if problem is not None else found,
    }


def retention_json(retention: Retention) -> dict[str, Any]:
    return {
        "keep_last": retention.keep_last,
        "keep_every_tokens": retention.keep_every_tokens,
        "phase_ends": list(retention.phase_ends),
    }
