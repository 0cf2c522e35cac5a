"""Checkpoints as they lie on disk: which are complete, sound, newest, best. No torch.

RUN/checkpoints/iter_0000100/               a Megatron torch_dist checkpoint
    .metadata common.pt metadata.json __*.distcp
    resolved.yaml                           the config that wrote it
    complete.json                           the marker, written last: without it the checkpoint does not count
RUN/checkpoints/iter_0000100.partial-3/     being written by attempt 3 of the run, or abandoned
RUN/checkpoints/latest_checkpointed_iteration.txt    RUN/checkpoints/best.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cpt.durable import sync, write_atomically
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.marker import MARKER, Marker, read_marker

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best.json"
_SHARD_HASHES = "sha256_{writer}.json"  # {file name: sha256}, left by whoever wrote the files
_NAME = re.compile(r"^iter_(\d{7,})$")
_PARTIAL = re.compile(r"^iter_\d{7,}\.partial-\d+$")


@dataclass(frozen=True)
class SavedCheckpoint:
    """One `iter_XXXXXXX` folder. Complete with a marker; with a problem its marker cannot be used."""

    path: Path
    iteration: int
    marker: Marker | None
    problem: CheckpointError | None = None

    @property
    def complete(self) -> bool:
        return self.marker is not None


def checkpoint_path(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def list_checkpoints(root: Path) -> list[SavedCheckpoint]:
    """All checkpoints under `root`, oldest first: complete ones, unfinished ones, and those with a problem."""
    found = []
    for path in root.glob("iter_*") if root.is_dir() else []:
        if (match := _NAME.match(path.name)) and path.is_dir():
            iteration = int(match.group(1))
            try:
                found.append(SavedCheckpoint(path, iteration, read_marker(path)))
            except CheckpointError as problem:
                found.append(SavedCheckpoint(path, iteration, None, problem))
    return sorted(found, key=lambda checkpoint: checkpoint.iteration)


def complete_checkpoints(root: Path) -> list[tuple[Path, Marker]]:
    """Complete checkpoints, newest first.

    Raises:
        CheckpointError: one has a marker that cannot be read or understood. A run must not go on without it: it would
            train again what that checkpoint holds, and delete it later.
    """
    found = list_checkpoints(root)
    for checkpoint in reversed(found):
        if checkpoint.problem is not None:
            raise checkpoint.problem
    return [(c.path, c.marker) for c in reversed(found) if c.marker is not None]


def seal(partial: Path, final: Path, resolved_config: str, marker: Marker) -> Marker:
    """Make a fully written checkpoint count: hash, rename `partial` to `final`, write the marker, then `latest`.

    One process calls this, after every rank has flushed its files. Return `marker` with the tables of the files.

    Raises:
        OSError: a file cannot be written; `partial` or `final` is left without a marker, or deleted.
        CheckpointError: `final` holds a checkpoint whose marker cannot be understood.
    """
    read_marker(final)  # one that this version cannot read must not be overwritten
    write_atomically(partial / "resolved.yaml", resolved_config.encode())
    for name in ("common.pt", "metadata.json"):  # the others are flushed by those who write them
        if (partial / name).is_file():
            sync(partial / name)
    shard_hashes = _take_shard_hashes(partial)
    sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    hashes = shard_hashes | {name: _sha256(partial / name) for name in sizes if name not in shard_hashes}
    marker = replace(marker, file_bytes=sizes, sha256=hashes)
    if final.exists():  # an abandoned or damaged one of the same iteration
        shutil.rmtree(final)
    partial.replace(final)
    sync(final.parent)
    try:
        write_atomically(final / MARKER, (json.dumps(marker.to_json(), indent=1) + "\n").encode())
    except OSError:
        shutil.rmtree(final, ignore_errors=True)  # of no use without, and the disk is full
        raise
    write_atomically(final.parent / LATEST, f"{marker.iteration}\n".encode())
    return marker


def leave_shard_hashes(path: Path, writer: int, names: Iterable[str]) -> None:
    """Hash the files that `writer` has just written, for `seal`; what it did not write is left out."""
    hashes = {name: _sha256(path / name) for name in names if (path / name).is_file()}
    with contextlib.suppress(OSError):  # a full disk: `seal` hashes the files itself, or fails likewise
        (path / _SHARD_HASHES.format(writer=writer)).write_text(json.dumps(hashes))


def _take_shard_hashes(path: Path) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for left in path.glob(_SHARD_HASHES.format(writer="*")):
        with contextlib.suppress(ValueError):  # cut short: `seal` hashes the files itself
            hashes |= json.loads(left.read_text())
        left.unlink()
    return hashes


def faults(path: Path, marker: Marker, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a complete checkpoint, or its files `names`: missing, of another size, of another sha256."""
    found = []
    for name in marker.file_bytes if names is None else names:
        size = marker.file_bytes[name]
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
        elif name in marker.sha256 and _sha256(file) != marker.sha256[name]:
            found.append(f"{name} has another sha256 than when it was written")
    return found


def remove_partials(root: Path) -> int:
    """Delete what killed saves left behind; the caller is the run's only writer. Returns how many."""
    partials = [path for path in root.glob("iter_*") if _PARTIAL.match(path.name)]
    for path in partials:
        shutil.rmtree(path, ignore_errors=True)
    return len(partials)


def read_best(root: Path) -> dict[str, Any] | None:
    """{"iteration", "name", "value"} of the best checkpoint and the sum of losses it is best by, None without one."""
    try:
        best = json.loads((root / BEST).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(best, dict) and isinstance(best.get("iteration"), int) and {"name", "value"} <= best.keys()
    return best if known else None


def score(weights: Mapping[str, float], validation: Mapping[str, float]) -> float | None:
    """Return the sum of the losses of the named sets with their weights, None where one was not measured."""
    if not all(name in validation for name in weights):
        return None
    return sum(weight * validation[name] for name, weight in weights.items())


def would_be_best(root: Path, weights: Mapping[str, float], validation: Mapping[str, float]) -> bool:
    """Whether a checkpoint with these losses would be the best so far: the lowest score, a number."""
    value, best = score(weights, validation), read_best(root)
    if value is None or not math.isfinite(value):
        return False
    if best is None or best["name"] != _named(weights) or not checkpoint_path(root, best["iteration"]).is_dir():
        return True
    return bool(value < best["value"])


def update_best(root: Path, weights: Mapping[str, float], marker: Marker) -> bool:
    """Record `marker` as the best if its score is the lowest so far. Return whether it is."""
    name, value = _named(weights), score(weights, marker.validation)
    if not would_be_best(root, weights, marker.validation):
        return False
    record = {"iteration": marker.iteration, "name": name, "value": value}
    write_atomically(root / BEST, (json.dumps(record) + "\n").encode())
    return True


def _named(weights: Mapping[str, float]) -> str:
    """How best.json calls what it compares: a set, or a sum such as '1 * domain + 0.5 * general'."""
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return " + ".join(f"{weight:g} * {name}" for name, weight in weights.items())


def remove_checkpoint(path: Path) -> None:
    """Delete one checkpoint, its marker first, so that a half-deleted one never counts as complete."""
    (path / MARKER).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Take one checkpoint out of the list at once, to be deleted; one left half deleted counts as abandoned."""
    aside = path.with_name(f"{path.name}.partial-0")  # no attempt has this number
    if aside.exists():
        shutil.rmtree(aside)
    path.replace(aside)
    sync(path.parent)
    return aside


def format_bytes(count: int) -> str:
    """1234567 -> '1.18 MiB'."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.2f} {unit}"


def free_bytes(root: Path) -> int:
    """Bytes that this user may still write to the file system of `root`."""
    stat = os.statvfs(root)
    return stat.f_bavail * stat.f_frsize


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
