"""`megatron-cpt train`: start or continue the run that a config describes."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cpt.config.load import load_config
from megatron_cpt.train.api import start_run


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Continue a run folder although its seed, name, precision or the content of its model changed.",
)
def train(config_path: Path, overrides: tuple[str, ...], accept_changes: bool) -> int:
    """Start the run that CONFIG describes, or continue it from its newest complete checkpoint.

    \b
    On one machine it starts one process per GPU itself (on a CPU host: gpus_per_node processes).
    Over several, start it once per process: under torchrun, or under srun with one task per GPU.
      megatron-cpt train config.yaml optimizer.lr=1e-5
    Exit codes: 0 finished, 1 failed, 2 user error, 75 stopped after saving, 76 do not restart, 77 hung.
    Ctrl-C saves at the end of the step and stops (75); a second one stops at once, without saving (130).
    """
    return start_run(lambda: load_config(config_path, overrides), str(config_path), accept_changes=accept_changes)
