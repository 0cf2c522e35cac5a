"""The file system of the run folder: room for the checkpoints that the plan keeps, and whether it can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.doctor.check import Check
from megatron_cpt.planner.disk import DiskNeed, disk_need
from megatron_cpt.runs.checkpoints import complete_checkpoints, format_bytes, free_bytes


def check_storage(config: RunConfig, arch: Architecture, derived: Derived) -> list[Check]:
    """Check the storage of the run folder, which need not exist."""
    existing = existing_parent(config)
    return [_writable(existing), _room(config, existing, disk_need(config, arch, derived))]


def existing_parent(config: RunConfig) -> Path:
    """Return the run folder, or the folder above it in which it would be created."""
    root = Path(config.folder).absolute()
    return next(path for path in (root, *root.parents) if path.is_dir())


def _writable(folder: Path) -> Check:
    looked_at = f"a file written to {folder} and removed"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"written by megatron-cpt doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        hint = "set run_dir to a folder that this user may write"
        return Check("run folder", looked_at, "error", f"{folder} cannot be written: {error.strerror}", hint)
    return Check("run folder", looked_at, "ok", "it can be written")


def _room(config: RunConfig, existing: Path, need: DiskNeed) -> Check:
    one, kept = need.checkpoint_bytes, need.kept
    saved = sum(marker.total_bytes for _, marker in complete_checkpoints(Path(config.folder) / "checkpoints"))
    free = free_bytes(existing)
    looked_at = (
        f"free bytes of {existing}; {kept} checkpoints of {format_bytes(one)}, {format_bytes(saved)} of them there"
    )
    hint = "free some space, lower checkpoint.keep_last, or set run_dir to a folder on larger storage"
    if free < one:
        return Check(
            "disk", looked_at, "error", f"{format_bytes(free)} are free, one checkpoint needs {format_bytes(one)}", hint
        )
    if free < (needed := max(0, kept * one - saved)):
        detail = f"{format_bytes(free)} are free, the checkpoints that this run keeps need {format_bytes(needed)} more"
        return Check("disk", looked_at, "error", detail, hint)
    return Check("disk", looked_at, "ok", f"{format_bytes(free)} are free, {format_bytes(needed)} are needed")
