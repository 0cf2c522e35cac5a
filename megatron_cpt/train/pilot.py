"""Short runs of one config with a few changes each, and what they gained and lost on the validation sets.

Each trial is a run of its own in FOLDER/NAME. What a finished one measured is kept in FOLDER/trials.json and its
checkpoint is deleted, so that a pilot that is started again goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.launch.place import under_launcher
from megatron_cpt.runs.exit_codes import FINISHED, STOPPED
from megatron_cpt.runs.folder import RunFolder, resolved_dict
from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.train.api import run_training

logger = logging.getLogger(__name__)

TRIALS = "trials.json"


@dataclass(frozen=True)
class Trial:
    """What a short run measured: loss of each validation set before the first and after the last step."""

    name: str
    config: str  # a hash of all that decides the outcome
    train_tokens: int
    first: dict[str, float]
    last: dict[str, float]


class PilotStopped(LaunchError):
    """Somebody asked the pilot to stop; the trial that ran has saved."""

    exit_code = STOPPED

    def __init__(self) -> None:
        super().__init__("stopped before the pilot was finished", hint="the same command continues")


def shortened(config: RunConfig, train_tokens: int, run_dir: Path, changes: Mapping[str, Any]) -> RunConfig:
    """Return `config` as a run of about `train_tokens` tokens in `run_dir`, with `changes` as overrides.

    All lengths of the schedule shrink with the budget. It validates at its ends only and saves once.
    """
    if config.checkpoint.branch_from is not None:
        raise ConfigError(
            "a pilot begins at the base model, and checkpoint.branch_from begins elsewhere",
            hint="checkpoint.branch_from=null, with model.init_from the model to begin with",
        )
    if config.phases:
        raise ConfigError(
            "a pilot shortens one budget, and this config has phases",
            hint="phases=[] with budget.train_tokens, for the pilot",
        )
    tree = config.model_dump(mode="json")
    scale = train_tokens / config.budget.train_tokens
    for section, key in (
        ("budget", "warmup_tokens"),
        ("schedule", "decay_tokens"),
        ("schedule", "cooldown_tokens"),
        ("batch", "rampup_tokens"),
    ):
        if tree[section].get(key):
            tree[section][key] = int(scale * tree[section][key])
    tree["run_dir"] = str(run_dir)
    tree["budget"] |= {"train_tokens": train_tokens, "rounding": "up"}
    tree["schedule"]["start_tokens"] = 0
    tree["eval"]["every"] = tree["checkpoint"]["save_every"] = tree["checkpoint"]["best_by"] = None
    tree["forgetting"]["gate"] = None  # the pilot measures what it would cut short
    tree["data"]["cache_dir"] = tree["data"]["cache_dir"] or str(run_dir.parent / "index_cache")
    return build_config(tree, [f"{key}={value}" for key, value in changes.items()], origin=f"the trial {run_dir.name}")


def run_trials(
    config: RunConfig, trials: Mapping[str, Mapping[str, Any]], train_tokens: int, folder: Path
) -> list[Trial]:
    """Run what `folder` does not hold yet, one after the other; `trials` are overrides by name.

    Raises:
        PilotStopped: somebody asked for it.
        LaunchError: this is a rank of a job, or a trial did not reach its end.
        CptError: what keeps a run from starting.
    """
    if under_launcher() or config.parallel.nodes > 1:
        raise LaunchError(
            "a pilot starts its runs itself, on one machine",
            hint="start it on one node without srun or torchrun, under a layout with parallel.nodes: 1",
        )
    short = {name: shortened(config, train_tokens, folder / name, changes) for name, changes in trials.items()}
    folder.mkdir(parents=True, exist_ok=True)
    known = {trial.name: trial for trial in _read(folder)}
    for number, (name, one) in enumerate(short.items(), 1):
        if name in known and known[name].config == _hash(one):
            continue
        logger.info("trial %d of %d, %s", number, len(short), name)
        known[name] = _run(name, one)
        _write(folder, [known[other] for other in short if other in known])
        shutil.rmtree(RunFolder(folder / name).checkpoints, ignore_errors=True)
    return [known[name] for name in short]


def _run(name: str, config: RunConfig) -> Trial:
    folder = RunFolder(Path(config.folder))
    code = run_training(config, accept_changes=True)
    if code == STOPPED:
        raise PilotStopped
    if code != FINISHED:
        raise LaunchError(f"the trial {name} ended with exit code {code}", hint=f"megatron-cpt status {folder.root}")
    rows = [row for row in read_metrics(folder.metrics) if row.get("event") == "validation"]
    first = {row["name"]: row["loss"] for row in reversed(rows) if row["iteration"] == 0}
    last = {row["name"]: row["loss"] for row in rows}
    return Trial(name, _hash(config), config.budget.train_tokens, first, last)


def _hash(config: RunConfig) -> str:
    tree = {key: value for key, value in resolved_dict(config).items() if key != "run_dir"}
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "cache_dir"}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> list[Trial]:
    try:
        return [Trial(**row) for row in json.loads((folder / TRIALS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _write(folder: Path, trials: Sequence[Trial]) -> None:
    write_atomically(folder / TRIALS, (json.dumps([asdict(trial) for trial in trials], indent=1) + "\n").encode())
