"""What the pages show of a run, read from its folder at the moment of asking."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.errors import CptError
from megatron_cpt.runs.folder import RunFolder, config_changes, read_resolved, resolved_dict, resolved_yaml
from megatron_cpt.runs.lease import read_lease
from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.views import checkpoints_json
from megatron_cpt.slurm.queue import slurm_view
from megatron_cpt.web.forms import run_form
from megatron_cpt.web.jobs import read_log
from megatron_cpt.web.run_list import ListedRun, RunList
from megatron_cpt.web.series import CurveStore
from megatron_cpt.web.values import entered_of


class RunViews:
    """Answers about the runs of a list."""

    def __init__(self, known_runs: RunList, curves: CurveStore) -> None:
        self.known_runs = known_runs
        self.store = curves

    def listed(self) -> list[dict[str, Any]]:
        """All runs in a line each."""
        return [_line(run) for run in self.known_runs.listed()]

    def status(self, path: Path) -> dict[str, Any]:
        """One run: its line, its checkpoints, the switches that are set, its logs, and Slurm's view of it."""
        folder = RunFolder(path)
        listed = self.known_runs.one(path)
        view, holder = slurm_view(folder), read_lease(folder.lease)
        try:
            checkpoints, problem = checkpoints_json(folder), listed.problem
        except CptError as error:
            checkpoints, problem = [], error.message
        return _line(listed) | {
            "folder": str(path),
            "problem": problem,
            "checkpoints": checkpoints,
            "switches": [name for name in ("SAVE", "STOP", "KILL") if (path / name).exists()],
            "logs": sorted(_logs(folder)),
            "writer": None if holder is None else str(holder),
            "slurm": None if view is None else view.to_json(),
        }

    def curves(self, path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
        """What a client lacks of the run's curves; `known` is curve -> [generation, points]."""
        understood = {
            name: (int(pair[0]), int(pair[1]))
            for name, pair in known.items()
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
        }
        return self.store.of(RunFolder(path).metrics).read(understood)

    def log(self, path: Path, asked: Mapping[str, str]) -> dict[str, Any]:
        """A rank's log from an offset on."""
        folder, name = RunFolder(path), asked.get("name", "rank_0000.log")
        offset = asked.get("offset", "0")
        path_of = _logs(folder)
        if name not in path_of:
            return {"text": "", "offset": 0}
        text, after = read_log(path_of[name], int(offset) if offset.isdecimal() else 0)
        return {"text": text, "offset": after}

    def config(self, path: Path, asked: Mapping[str, str]) -> dict[str, Any]:
        """The config in force, and how it differs from another run's."""
        config = read_resolved(RunFolder(path))
        other = self.known_runs.path(asked.get("against", ""))
        changes = (
            []
            if other is None
            else config_changes(resolved_dict(read_resolved(RunFolder(other))), resolved_dict(config))
        )
        return {
            "yaml": resolved_yaml(config),
            "differs": [{"path": c.path, "theirs": c.old, "ours": c.new} for c in changes],
        }

    def values(self, path: Path) -> dict[str, Any]:
        """The run's config as it would be entered in the form: what differs from the defaults."""
        tree = read_yaml(RunFolder(path).resolved)
        plain = resolved_dict(RunConfig.model_validate({"job_name": "x", "model": {"init_from": "random"}}))
        return {"values": entered_of(run_form(), _without(tree, plain))}

    def csv(self, path: Path) -> str:
        """Every logged step, one row each, as a table."""
        rows = [row for row in read_metrics(RunFolder(path).metrics) if "event" not in row]
        columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def _logs(folder: RunFolder) -> dict[str, Path]:
    """The logs of all ranks and starts by their path below RUN/logs; links are left out, they may lead anywhere."""
    return {str(path.relative_to(folder.logs)): path for path in folder.logs.rglob("*.log") if not path.is_symlink()}


def _line(run: ListedRun) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": run.id, "name": run.name, "problem": run.problem}
    if run.summary is None:
        return shown | {"state": "unreadable"}
    return run.summary.to_json() | shown


def _without(tree: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `tree` that `plain` does not have."""
    left: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "run_dir" or value == plain.get(key):
            continue
        other = plain.get(key)
        left[key] = _without(value, other) if isinstance(value, dict) and isinstance(other, dict) and other else value
    return left
