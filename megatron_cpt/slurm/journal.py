"""RUN/slurm.jsonl: what became of a run on Slurm. One line per event, appended by the job itself or by `submit`.

    submitted  job, script                                     `megatron-cpt submit` called sbatch
    began      job, restart, nodes, attempts, consumed_tokens  a job started, before its ranks
    ended      job, restart, cause, action, exit_code          its ranks ended, or its preflight refused a node
A `began` that no `ended` follows was cut off: its node failed, or the job was cancelled.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.metrics import read_rows

Event = dict[str, Any]


def journal_path(folder: RunFolder) -> Path:
    return folder.root / "slurm.jsonl"


def read_journal(folder: RunFolder) -> list[Event]:
    """All events, oldest first; a line that was cut short is left out."""
    return read_rows(journal_path(folder))[0]


def record(folder: RunFolder, event: str, **fields: Any) -> None:
    """Append an event.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
    try:
        with journal_path(folder).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write the run folder {folder.root}: {error.strerror}",
            hint="set run_dir to a folder you may write, with space left",
        ) from error


def restarts(events: list[Event]) -> list[Event]:
    """Every start with its end: {job, restart, began, nodes, cause, action}; cause None while it may be running."""
    found: list[Event] = []
    for event in events:
        if event["event"] == "began":
            if found and found[-1]["cause"] is None:
                found[-1]["cause"] = event.get("before") or "cut off: its node failed, or it was cancelled or preempted"
            kept = {key: event.get(key) for key in ("job", "restart", "nodes", "consumed_tokens")}
            found.append({**kept, "began": event["time"], "cause": None, "action": None})
        elif event["event"] == "ended":  # of two jobs that were submitted at once, each ends its own start
            own = [start for start in found if (start["job"], start["restart"]) == (event["job"], event["restart"])]
            for start in own[-1:]:
                start |= {"cause": event["cause"], "action": event["action"]}
    return found
