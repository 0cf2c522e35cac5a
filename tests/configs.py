"""Run configs for tests: what nearly all of them say, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def tiny_run(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of seconds in FOLDER/run, from FOLDER/model on FOLDER/data; a section given here adds to the default's."""
    tree: dict[str, Any] = {
        "job_name": "tiny",
        "run_dir": str(folder / "run"),
        "model": {"init_from": str(folder / "model"), "check_start": False},
        "budget": {"train_tokens": 4096, "warmup_tokens": 0},
        "batch": {"seq_length": 64, "global_batch_size": 8},
        "precision": {"dtype": "fp32"},
        "data": {"train": [{"name": "data", "prefix": str(folder / "data")}], "max_epochs": 9},
    }
    return merged(tree, sections)


def write_tiny_run(folder: Path, **sections: Any) -> Path:
    """Write `tiny_run` to FOLDER/config.yaml. Return the path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_run(folder, **sections)))
    return path


def merged(tree: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """`tree` with each section of `sections` laid over its own, key by key."""
    return tree | {
        name: tree[name] | value if isinstance(value, dict) and name in tree else value
        for name, value in sections.items()
    }
