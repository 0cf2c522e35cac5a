"""What a report says of one run, read from its folder alone: finished or not, restarted, diverged, queued."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.budget import format_count
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.console import format_seconds
from megatron_cpt.runs.checkpoints import list_checkpoints
from megatron_cpt.runs.comparison import ComparedRun, ValidationChange, compared_run
from megatron_cpt.runs.folder import RunFolder, read_resolved, resolved_yaml
from megatron_cpt.runs.metrics import Row, finite, read_metrics, read_rows
from megatron_cpt.runs.status import RunStatus, read_status
from megatron_cpt.runs.task_results import TaskRow, newest_task_rows, task_sentence
from megatron_cpt.runs.views import checkpoints_json

_QUIET = frozenset({"validation", "validating", "save", "saved", "start", "finished"})
_STATES = {
    "finished": "trained its whole budget",
    "running": "is still running",
    "stopped": "was stopped before its budget was trained",
    "killed": "was killed before its budget was trained",
    "diverged": "diverged",
    "failed": "failed",
    "interrupted": "was interrupted",
    "not_started": "has not started",
}


@dataclass(frozen=True)
class Incident:
    """Something that did not go as planned."""

    event: str
    iteration: int
    consumed_tokens: int
    text: str


@dataclass(frozen=True)
class RunFacts:
    """One run, as a report shows it."""

    status: RunStatus
    rows: tuple[Row, ...]  # of its metrics, those that count
    compared: ComparedRun
    config: RunConfig
    config_yaml: str
    verdict: str
    world_size: int
    gpu_hours: float  # of all steps that count
    seconds_by_part: dict[str, float]
    source_tokens: dict[str, int]  # trained of each source, as the newest checkpoint's ledger has it
    incidents: tuple[Incident, ...]
    checkpoints: tuple[dict[str, Any], ...]
    history: tuple[dict[str, Any], ...]
    identity: dict[str, Any]
    tasks: tuple[TaskRow, ...]

    @property
    def name(self) -> str:
        return Path(self.status.run_dir).name


def read_facts(root: Path) -> RunFacts:
    """Return what is known of the run in `root`.

    Raises:
        CheckpointError: it is not a run folder.
        ConfigError: its resolved.yaml is not a config of this version.
    """
    folder, status = RunFolder(root), read_status(root)
    config, rows = read_resolved(folder), read_metrics(folder.metrics)
    compared = compared_run(root, rows)
    steps = [row for row in rows if "event" not in row]
    world_size, tasks = config.parallel.world_size, newest_task_rows(root)
    return RunFacts(
        status=status,
        rows=tuple(rows),
        compared=compared,
        config=config,
        config_yaml=resolved_yaml(config),
        verdict=_verdict(status, compared, compared.step_hours * world_size, tasks),
        world_size=world_size,
        gpu_hours=compared.step_hours * world_size,
        seconds_by_part=_seconds_by_part(steps),
        source_tokens=_source_tokens(folder),
        incidents=tuple(_incidents(rows)),
        checkpoints=tuple(checkpoints_json(folder)),
        history=tuple(read_rows(folder.history)[0]),
        identity=_json(root / "identity.json"),
        tasks=tuple(tasks),
    )


def _verdict(status: RunStatus, compared: ComparedRun, gpu_hours: float, tasks: list[TaskRow]) -> str:
    """One sentence: how it ended, what it gained on each set and lost, what the tasks say, and what that cost."""
    parts = [f"The run {_STATES.get(status.state, status.state)}: {format_count(status.consumed_tokens)} tokens"]
    changes = [_change(name, change) for name, change in compared.validation.items()]
    parts += [text for text in changes if text]
    parts += [sentence for row in tasks if (sentence := task_sentence(row))]
    if gpu_hours:
        hours = f"{gpu_hours:,.1f} GPU-hours" if gpu_hours >= 1 else f"{format_seconds(gpu_hours * 3600)} of all ranks"
        parts.append(f"at {hours}")
    if not any(changes) and all(row.before is None for row in tasks):
        parts.append("nothing was measured before and after")
    return ", ".join(parts) + "."


def _change(name: str, change: ValidationChange) -> str:
    if change.first is None or change.last is None or max(change.first, change.last) > 700:
        return ""
    relative = math.expm1(change.last - change.first)
    if abs(relative) < 5e-4:
        return f"perplexity on {name} as before ({math.exp(change.last):,.2f})"
    word = "down" if relative < 0 else "up"
    return (
        f"perplexity on {name} {word} {abs(relative):.1%} "
        f"({math.exp(change.first):,.2f} to {math.exp(change.last):,.2f})"
    )


def _seconds_by_part(steps: list[Row]) -> dict[str, float]:
    """Seconds of all steps by part of the step."""
    whole: dict[str, float] = {}
    for row in steps:
        for key, value in row.items():
            if key.endswith("_seconds") and key not in ("step_seconds", "eta_seconds"):
                part = key.removesuffix("_seconds")
                whole[part] = whole.get(part, 0.0) + (finite(value) or 0.0)
    return dict(sorted(whole.items(), key=lambda item: -item[1]))


def _source_tokens(folder: RunFolder) -> dict[str, int]:
    markers = [c.marker for c in list_checkpoints(folder.checkpoints) if c.marker is not None]
    if not markers:
        return {}
    sources = markers[-1].ledger.get("sources") or {}
    found = {}
    for name, position in sources.items():
        tokens = position.get("tokens") if isinstance(position, dict) else None
        if isinstance(tokens, int):
            found[str(name)] = tokens
    return found


def _incidents(rows: list[Row]) -> list[Incident]:
    """Events other than the ordinary ones, and each later start of the run."""
    found, start = [], None
    for row in rows:
        place = (int(row.get("iteration") or 0), int(row.get("consumed_tokens") or 0))
        if start is not None and row.get("start") != start and row.get("start", 0) > start:
            found.append(Incident("restarted", *place, f"start {row.get('start')}"))
        start = max(start or 0, row.get("start") or 0)
        event = row.get("event")
        if event is not None and event not in _QUIET:
            text = next((str(row[key]) for key in ("reason", "text", "error") if row.get(key)), "")
            found.append(Incident(str(event), *place, text[:500]))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
