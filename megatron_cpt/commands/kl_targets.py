"""`megatron-cpt kl-targets`: store what the base model says, so that training needs no second model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from megatron_cpt.commands.rank_job import speaks_for_all, start_ranks, told_to_parent
from megatron_cpt.config.load import load_config
from megatron_cpt.console import ProgressBar, print_summary
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.kl_targets import (
    KlTargets,
    check_order,
    counted,
    end_tokens,
    read_targets,
    spare_tokens,
    targets_path,
    wanted_targets,
)
from megatron_cpt.launch.place import adopt_slurm_ranks, check_world_size, rank_here, under_launcher
from megatron_cpt.launch.preflight import check_weights, index_cache_dir
from megatron_cpt.launch.start import PreparedRun, load_run
from megatron_cpt.runs.checkpoints import format_bytes


@click.command("kl-targets")
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--overwrite", is_flag=True, help="Replace targets of another base, tokenizer, dataset or order.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def kl_targets(config_path: Path, overrides: tuple[str, ...], overwrite: bool, as_json: bool) -> int:
    """Store the base's likeliest next tokens beside the datasets that forgetting.kl of CONFIG counts.

    \b
      megatron-cpt kl-targets config.yaml forgetting.kl.offline_top_k=32
      megatron-cpt train config.yaml forgetting.kl.offline_top_k=32
    The run then holds one model, not two, and a step costs no second forward pass. Stored is what the budget reads, in
    the order in which this seed and sequence length read it: 6 bytes times top_k and 2 more per token. It runs under
    CONFIG's layout, as `train`. Killed, it goes on where it was; with a larger budget it goes on where it ended.
    """
    os.environ.update(adopt_slurm_ranks())
    named = str(config_path)
    if under_launcher():
        with told_to_parent():
            run = load_run(load_config(config_path, overrides), named)
            check_world_size(run.checked.config.parallel.world_size)
            wanted = _wanted(run)
            _write(run, wanted)
        if speaks_for_all():
            _print(wanted, as_json)
        return 0
    run = load_run(load_config(config_path, overrides), named)
    wanted = _wanted(run)
    check_weights(run.checked.config, run.checked.origin)
    for prefix, targets in wanted.items():
        _refuse_or_remove(prefix, targets, overwrite)
    work = Path(f"{run.checked.config.folder}.kl-targets")
    start_ranks(run.checked.config, "kl-targets", [named, *overrides], work)
    _print(wanted, as_json)
    return 0


def _wanted(run: PreparedRun) -> dict[str, KlTargets]:
    """The targets that the run needs, by the prefix of their dataset."""
    checked = run.checked
    asked = checked.config.forgetting.active_kl
    if asked is None or asked.offline_top_k is None:
        raise ConfigError(
            "forgetting.kl.offline_top_k is not set: this run needs no stored targets",
            hint="forgetting.kl.offline_top_k=32",
        )
    needed, found = end_tokens(run.ledger, run.plans), {}
    for dataset in counted(checked.config, checked.datasets.train):
        wanted = wanted_targets(checked, dataset, needed[dataset.name] + spare_tokens(checked.config))
        check_order(checked.config, run.ledger, wanted)
        found[dataset.prefix] = wanted
    return found


def _refuse_or_remove(prefix: str, wanted: KlTargets, overwrite: bool) -> None:
    found = read_targets(prefix)
    changes = [] if found is None else found.differences(wanted)
    if not changes:
        return
    path = targets_path(prefix, "json")
    if not overwrite:
        listed = "\n".join(f"  {change}" for change in changes)
        raise ConfigError(
            f"{path} holds targets of another run's forgetting.kl; it differs in\n{listed}",
            hint="--overwrite replaces them; a copy of the dataset under another prefix keeps both",
        )
    path.unlink()  # the record first: without it the files count for nothing


def _write(run: PreparedRun, wanted: dict[str, KlTargets]) -> None:
    """Be one rank."""
    from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

    adapt_megatron_core_to_cpu()
    from megatron_cpt.data.batches import open_batches
    from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
    from megatron_cpt.train.console_view import open_console
    from megatron_cpt.train.kl_targets import TargetsJob, run_targets_jobs

    checked = run.checked
    jobs = [TargetsJob(d, wanted[d.prefix]) for d in checked.datasets.train if d.prefix in wanted]
    batches = open_batches(checked.config, checked.datasets, run.ledger, run.plans, index_cache_dir(checked.config))
    init_runtime(checked.config)
    try:
        if rank_here() != 0:
            run_targets_jobs(checked, batches, jobs, lambda tokens: None)
            return
        total = sum(targets.tokens for targets in wanted.values())
        with ProgressBar("kl-targets", total, "tokens", stream=open_console()) as bar:
            run_targets_jobs(checked, batches, jobs, bar.update)
    finally:
        shutdown_runtime()


def _print(wanted: dict[str, KlTargets], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [{"prefix": prefix, **asdict(targets)} for prefix, targets in wanted.items()]
    lines = [
        f"{targets_path(prefix, '*')}: {targets.top_k} tokens and the rest of {targets.tokens:,} tokens of "
        f"{targets.source}, {format_bytes(sum(targets.file_bytes.values()))}"
        for prefix, targets in wanted.items()
    ]
    print_summary(json.dumps({"targets": rows}) if as_json else "\n".join(lines))
