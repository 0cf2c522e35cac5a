"""`megatron-cpt fisher`: how much each weight of a base model matters on a text, for forgetting.ewc."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from megatron_cpt.commands.rank_job import speaks_for_all, start_ranks, told_to_parent
from megatron_cpt.config.load import load_config
from megatron_cpt.console import ProgressBar, print_summary
from megatron_cpt.launch.fisher import FisherJob, check_fisher_job, read_fisher
from megatron_cpt.launch.place import adopt_slurm_ranks, check_world_size, rank_here, under_launcher
from megatron_cpt.runs.checkpoints import format_bytes


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--data", required=True, metavar="PREFIX", help="Dataset of general text, by the model's tokenizer.")
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Samples of batch.seq_length tokens, spread evenly over the dataset.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def fisher(config_path: Path, overrides: tuple[str, ...], data: str, folder: Path, samples: int, as_json: bool) -> int:
    """Estimate the Fisher diagonal of CONFIG's base model on general text, once, for forgetting.ewc.fisher.

    \b
      megatron-cpt fisher config.yaml --data data/general --to fisher/base
      megatron-cpt train config.yaml forgetting.ewc.fisher=fisher/base forgetting.ewc.strength=10
    It runs under CONFIG's layout: on one machine it starts one process per GPU itself; over several start it once per
    process, under torchrun or srun, as `train`. Each sample costs about a training step of one sample. The folder is a
    distributed checkpoint of the model's shape in fp32, and any layout reads it.
    """
    os.environ.update(adopt_slurm_ranks())
    named = str(config_path)
    if under_launcher():
        with told_to_parent():
            job = check_fisher_job(load_config(config_path, overrides), named, data, samples, folder)
            _estimate(job)
        if speaks_for_all():
            _print(folder, as_json)
        return 0
    job = check_fisher_job(load_config(config_path, overrides), named, data, samples, folder)
    arguments = [str(config_path), *overrides, "--data", data, "--to", str(folder), "--samples", str(samples)]
    start_ranks(job.config, "fisher", arguments, folder.with_name(f"{folder.name}.work"))
    _print(folder, as_json)
    return 0


def _print(folder: Path, as_json: bool) -> None:
    record = read_fisher(folder)
    size = format_bytes(sum(record.file_bytes.values()))
    print_summary(
        json.dumps(record.to_json())
        if as_json
        else f"{folder}: Fisher values of {record.tokens:,} tokens in {record.samples:,} samples, {size}\n"
        f"use them with forgetting.ewc.fisher={folder}"
    )


def _estimate(job: FisherJob) -> None:
    """Be one rank of the estimate."""
    check_world_size(job.config.parallel.world_size)
    from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

    adapt_megatron_core_to_cpu()
    from megatron_cpt.forgetting.fisher import for_fisher
    from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
    from megatron_cpt.train.console_view import open_console
    from megatron_cpt.train.fisher import run_fisher_job

    init_runtime(for_fisher(job.config))
    try:
        if rank_here() != 0:
            run_fisher_job(job, lambda done: None)
            return
        with ProgressBar("fisher", job.samples, "samples", stream=open_console()) as bar:
            run_fisher_job(job, bar.update)
    finally:
        shutdown_runtime()
