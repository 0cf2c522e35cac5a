"""`megatron-cpt doctor`: check a machine, its data and its model before a job is started on it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from megatron_cpt.config.load import load_config
from megatron_cpt.doctor.check import Check, failed
from megatron_cpt.doctor.examine import examine, examine_alone
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.place import adopt_slurm_ranks, rank_here


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--preflight", is_flag=True, help="Also join all ranks, measure all-reduce, and run the first samples.")
@click.option(
    "--report-dir",
    type=click.Path(path_type=Path),
    help="Check this machine alone, also within a job, and write what is found to this folder, by its name.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def doctor(
    config_path: Path, overrides: tuple[str, ...], preflight: bool, report_dir: Path | None, as_json: bool
) -> int:
    """Check the machine that will run CONFIG: versions, GPUs, port, disk, data, tokenizer, untrained tokens.

    \b
    Run it on a machine of the job, before the job:
      srun --nodes=1 --gpus-per-node=8 megatron-cpt doctor config.yaml
    Or on all of them, one process each or one per GPU; rank 0 prints what it and the others found:
      srun --ntasks-per-node=1 --gpus-per-node=8 megatron-cpt doctor config.yaml
    Or on each by itself, with a small computation on every GPU, as a batch job does before it trains:
      srun --ntasks-per-node=1 --gpus-per-node=8 megatron-cpt doctor config.yaml --preflight --report-dir reports
    Each line says what was looked at. Exit code 0, or 1 when a check found an error; a wrong config is 2.
    """
    if report_dir is not None:
        return _report_alone(config_path, overrides, report_dir, preflight=preflight)
    os.environ.update(adopt_slurm_ranks())
    config = load_config(config_path, overrides)
    checks = examine(config, str(config_path), preflight=preflight)
    if rank_here() != 0:
        return 0  # rank 0 speaks for all
    if as_json:
        click.echo(json.dumps({"failed": failed(checks), "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        click.echo(_text(checks))
    return 1 if failed(checks) else 0


def _report_alone(config_path: Path, overrides: tuple[str, ...], folder: Path, *, preflight: bool) -> int:
    """Check this machine, and write FOLDER/NAME.json; NAME is Slurm's for the machine, or the host name."""
    named = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    checks = examine_alone(lambda: load_config(config_path, overrides), str(config_path), preflight=preflight)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report = {"failed": failed(checks), "checks": [asdict(check) for check in checks]}
        write_atomically(folder / f"{named}.json", json.dumps(report, indent=1).encode())
    except OSError as error:
        raise LaunchError(
            f"cannot write {folder}: {error.strerror}", hint="give a folder that every node of the job may write"
        ) from error
    click.echo(_text(checks))
    return 1 if failed(checks) else 0


def _text(checks: Sequence[Check]) -> str:
    lines = []
    for check in checks:
        where = f"{check.host} " if check.host else ""
        lines.append(f"{check.verdict:<12} {where}{check.name}: {check.detail}")
        lines.append(f"{'':<12}   looked at {check.looked_at}")
        if check.hint is not None and check.verdict != "ok":
            lines.append(f"{'':<12}   hint: {check.hint}")
    counts = {
        verdict: sum(check.verdict == verdict for check in checks) for verdict in ("error", "warning", "not checked")
    }
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f" of {len(checks)} checks")
    return "\n".join(lines)
