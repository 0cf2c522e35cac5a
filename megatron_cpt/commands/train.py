"""`megatron-cpt train`: start or continue the run that a config describes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from megatron_cpt.data.datasets import plan_sources
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.local import adopt_slurm_ranks, run_ranks, under_launcher
from megatron_cpt.launch.preflight import announce, check_free_space, check_job, standing_ledger
from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FINISHED, STOPPED
from megatron_cpt.runs.folder import RunFolder, check_continues, prepare_run_folder, record_start
from megatron_cpt.runs.lease import refuse_if_held_here

logger = logging.getLogger(__name__)


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--accept-changes", is_flag=True, help="Continue a run folder although its model, seed or name in CONFIG changed."
)
def train(config_path: Path, overrides: tuple[str, ...], accept_changes: bool) -> int:
    """Start the run that CONFIG describes, or continue it from its newest complete checkpoint.

    \b
    On one machine it starts one process per GPU itself (on a CPU host: gpus_per_node processes).
    Over several, start it once per process: under torchrun, or under srun with one task per GPU.
      megatron-cpt train config.yaml optimizer.lr=1e-5
    Exit codes: 0 finished, 1 failed, 2 user error, 75 stopped after saving, 76 do not restart, 77 hung.
    """
    os.environ.update(adopt_slurm_ranks())
    flags = ["--accept-changes"] if accept_changes else []
    arguments = [str(config_path), *overrides, *flags]
    if under_launcher():
        from megatron_cpt.train.rank import main

        return main(arguments)
    job = check_job(config_path, overrides)
    if job.config.parallel.nodes > 1:
        raise LaunchError(
            f"parallel.nodes = {job.config.parallel.nodes}: one machine cannot start the others",
            hint="submit slurm/qwen2_72b_cpt.sbatch, or run this command under torchrun on every node",
        )
    folder = RunFolder(Path(job.config.folder))
    if folder.kill_switch.exists():
        logger.error("%s is there: remove it to let this run start", folder.kill_switch)
        return DO_NOT_RESTART
    check_continues(job.config, accept_changes=accept_changes)
    refuse_if_held_here(folder.lease)
    ledger = standing_ledger(job)
    if ledger.tokens >= job.config.budget.train_tokens:
        click.echo(
            f"{folder.root} is finished: {ledger.tokens:,} tokens trained, the last checkpoint is "
            f"{complete_checkpoints(folder.checkpoints)[0][0]}. Raise budget.train_tokens to go on."
        )
        return FINISHED
    plans = plan_sources(job.config, job.datasets, ledger)
    folder, changes = prepare_run_folder(job.config, job.model_dir, accept_changes=accept_changes)
    record_start(folder, job.config, changes)
    announce(job, plans, changes)
    check_free_space(job)
    code = run_ranks(folder, arguments, job.derived.world_size)
    if code == STOPPED:
        logger.info("stopped after saving; the same command continues")
    return code
