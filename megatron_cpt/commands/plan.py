"""`megatron-cpt plan`: validate a config and print what follows from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.load import load_config
from megatron_cpt.config.phase import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.launch.origin import side_files_dir
from megatron_cpt.train.schedule import draw_schedule, sample_schedule


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def plan(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Validate CONFIG and print its derived numbers; nothing is started.

    \b
    Every problem is listed at once with a legal value. Try a change without editing the file:
      megatron-cpt plan examples/qwen2_72b/config.yaml budget.train_tokens=1.5B parallel.pp=8
    """
    config = load_config(config_path, overrides)
    arch = read_architecture(side_files_dir(config.model))
    derived = derive(config, arch, origin=str(config_path))
    if as_json:
        click.echo(json.dumps(plan_json(config, arch, derived), indent=1))
    else:
        _print_plan(config, arch, derived)


def plan_json(config: RunConfig, arch: Architecture, derived: Derived) -> dict[str, Any]:
    """The plan under the names of the config contract."""
    return {
        "job_name": config.job_name,
        "run_dir": config.folder,
        **{key: value for key, value in dataclasses.asdict(derived).items() if key != "notes"},
        "notes": list(derived.notes),
        "architecture": dataclasses.asdict(arch),
        "learning_rates": [
            {"consumed_tokens": tokens, "lr": lr} for tokens, lr in sample_schedule(phase_at(config), 21)
        ],
        "config": config.model_dump(mode="json"),
    }


def _print_plan(config: RunConfig, arch: Architecture, derived: Derived) -> None:
    parallel, batch = config.parallel, config.batch
    rows = [
        ("model", f"{arch.family}, {arch.num_parameters / 1e9:.2f} billion parameters ({arch.num_parameters:,})"),
        ("ranks", f"{derived.world_size} = {parallel.nodes} nodes x {parallel.gpus_per_node}"),
        (
            "layout",
            f"TP {parallel.tp} x PP {parallel.pp} x CP {parallel.cp} x DP {derived.data_parallel_size}"
            + (f", {parallel.vpp} virtual stages" if parallel.vpp else "")
            + (", sequence parallel" if derived.sequence_parallel else ""),
        ),
        ("layers per stage", ", ".join(map(str, derived.layers_per_stage or ()))),
        ("vocabulary rows", f"{arch.vocab_size:,} padded to {derived.padded_vocab_size:,}"),
        (
            "one step",
            f"{derived.tokens_per_step:,} tokens = {batch.global_batch_size} samples x {batch.seq_length} tokens, "
            f"{derived.gradient_accumulation_steps} micro-batches of {batch.micro_batch_size}",
        ),
        ("budget", f"{derived.train_tokens:,} tokens = {derived.train_iters:,} iterations"),
        ("warm-up", f"{derived.warmup_tokens:,} tokens"),
        ("schedule", f"{config.schedule.kind}, lr {config.optimizer.lr:g} to {config.optimizer.min_lr:g}"),
        ("", draw_schedule(phase_at(config))),
        ("checkpoints", f"every {config.checkpoint.save_every}, and the last step"),
        ("run folder", config.folder),
    ]
    click.echo(f"plan of {config.job_name}")
    for name, value in rows:
        click.echo(f"  {name:<17} {value}")
    for note in derived.notes:
        click.echo(f"note: {note}")
