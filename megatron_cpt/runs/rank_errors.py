"""RUN/logs/error_rank_XXXX.json: why a rank ended, left by it for whoever started it and for `status`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPT_LOGS = "MEGATRON_CPT_ATTEMPT_LOGS"  # a folder for the logs of one start, where a batch job names one


@dataclass(frozen=True)
class RankError:
    message: str
    hint: str | None
    exit_code: int


def rank_error_path(logs: Path, rank: int) -> Path:
    """Where a rank that fails for a known reason says so, in the folder of its logs."""
    return logs / f"error_rank_{rank:04d}.json"


def read_rank_errors(logs: Path) -> list[RankError]:
    """What the ranks left in a folder of logs, in the order of their ranks."""
    return [read_rank_error(path) for path in sorted(logs.glob("error_rank_*.json"))]


def leave_rank_error(path: Path, error: RankError) -> None:
    """Write `error` to `path`; on a full disk nothing, the rank's log has said it."""
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(asdict(error)), encoding="utf-8")


def read_rank_error(path: Path) -> RankError:
    """What a rank left; it may have been killed while it wrote."""
    try:
        told = json.loads(path.read_text())
        return RankError(str(told["message"]), told["hint"], int(told["exit_code"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RankError(f"{path} was cut short", f"the logs in {path.parent} say more", 1)
