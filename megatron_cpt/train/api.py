"""The Python way into a run: the same checks, processes and run folder as `megatron-cpt train`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_cpt.config.run_config import RunConfig


def train_config(config: RunConfig, overrides: Sequence[str] = (), *, accept_changes: bool = False) -> int:
    """Start the run or continue it from its newest complete checkpoint; the exit code of `megatron-cpt train`.

    Ranks are processes of their own, which read the config from a file, as they do under the command.

    Raises:
        CptError: what is wrong with the config, the model, the data or the run folder, or a rank's own error.
    """
    from megatron_cpt.commands.train import train

    with tempfile.TemporaryDirectory(prefix="megatron-cpt-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        assert train.callback is not None
        return int(train.callback(path, tuple(overrides), accept_changes))
