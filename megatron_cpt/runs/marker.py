"""complete.json: the last file of a checkpoint. With it the checkpoint counts, without it the save was not finished.

    format 0   no key `format`; `start` and `loop` stand for `attempt` and `memory`
    format 1   the fields of `Marker`

A marker that is there and cannot be understood belongs to a checkpoint that somebody may need: reading it is an
error, never "no checkpoint".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_cpt.errors import CheckpointError

MARKER = "complete.json"
FORMAT = 1
_RENAMED = {"start": "attempt", "loop": "memory"}  # of format 0
_TYPES = {"int": int, "str": str, "dict": dict}


@dataclass(frozen=True)
class Marker:
    """What a checkpoint holds, and what its files must look like."""

    iteration: int
    consumed_tokens: int
    ledger: dict[str, Any]  # megatron_cpt.data.ledger.Ledger
    layout: dict[str, int]  # tp, pp, cp, vpp, dp
    optimizer_sharding: str  # "fully_reshardable", "dp_reshardable" or "replicated"
    attempt: int  # number of the launch of the run that wrote it
    created: str
    versions: dict[str, str]
    validation: dict[str, float] = field(default_factory=dict)  # loss per named set, as last measured
    memory: dict[str, Any] = field(default_factory=dict)  # component -> what it remembers, as JSON
    file_bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)  # of every file

    @property
    def total_bytes(self) -> int:
        return sum(self.file_bytes.values())

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Marker:
        """The marker of a JSON object of this format or an older one.

        Raises:
            ValueError: a newer format, an unknown or missing key, or a value of another type.
        """
        given = dict(raw)
        version = given.pop("format", 0)
        if version not in range(FORMAT + 1):
            raise ValueError(f"it has format {version!r}, and this version reads formats up to {FORMAT}")
        if version == 0:
            given = {_RENAMED.get(key, key): value for key, value in given.items()}
        known = {f.name: _TYPES[str(f.type).partition("[")[0]] for f in fields(cls)}
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(f"it has keys that this version does not know: {', '.join(unknown)}")
        if missing := sorted(known.keys() - given.keys() - {"validation", "memory"}):
            raise ValueError(f"it lacks {', '.join(missing)}")
        for key, value in given.items():
            if not isinstance(value, known[key]):
                raise ValueError(f"{key} is {value!r}, not of type {known[key].__name__}")
        if any(not isinstance(size, int) for size in given["file_bytes"].values()):
            raise ValueError("file_bytes holds something else than sizes")
        return cls(**given)


def read_marker(checkpoint: Path) -> Marker | None:
    """The marker of a checkpoint folder, None when it has none: then its save was not finished.

    Raises:
        CheckpointError: there is a marker, and it cannot be read or understood.
    """
    path = checkpoint / MARKER
    raw: Any = None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        return Marker.from_json(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot use {path}: {reason}{_written_by(raw)}", hint=_what_to_do(raw, path)) from error


def _written_by(raw: Any) -> str:
    versions = raw.get("versions") if isinstance(raw, dict) else None
    version = versions.get("megatron_cpt") if isinstance(versions, dict) else None
    return f" (written by megatron-cpt {version})" if version else ""


def _what_to_do(raw: Any, path: Path) -> str:
    first = "restore the file from a copy" if raw is None else "use the version of megatron-cpt that wrote it"
    return f"{first}, or move {path.parent} elsewhere to do without this checkpoint; nothing was deleted"
