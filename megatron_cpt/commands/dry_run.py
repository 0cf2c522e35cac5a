"""`megatron-cpt dry-run`: every rank of a config in this process, without a GPU and without memory for a weight."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

from megatron_cpt.config.load import load_config
from megatron_cpt.console import ProgressBar
from megatron_cpt.launch.survey import Survey, raise_findings, survey


@click.command("dry-run")
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--strict", is_flag=True, help="What is missing on this machine is an error.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def dry_run_command(config_path: Path, overrides: tuple[str, ...], strict: bool, as_json: bool) -> int:
    """Build every rank of CONFIG on this CPU, and check that the ranks fit together.

    Each rank gets its real model, gradient buffers, optimizer and checkpoint shards, as shapes without memory. Checked
    are the number of parameters against config.json, that the shards of all ranks make whole tensors, that pipeline
    stages agree on what they exchange, and the headers of the weights and datasets that are on this machine. One step
    of the real schedule counts the bytes that a rank of each stage holds. Qwen2-72B on 32 ranks takes some seconds.

    Exit code 1 if something does not fit together, 2 if the config cannot run at all.

    \b
    Try a layout without editing the file:
      megatron-cpt dry-run examples/qwen2_72b/config.yaml parallel.tp=4 parallel.pp=8
    """
    looked_at = survey(load_config(config_path, overrides), str(config_path))
    raise_findings(looked_at.blocking(strict=strict), str(config_path))
    return _build(looked_at, as_json)


def _build(looked_at: Survey, as_json: bool) -> int:
    """Run, print the result and return the exit code. torch is imported here, and must not find a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_cpt.dry_run.every_rank import dry_run
    from megatron_cpt.dry_run.files import read_headers
    from megatron_cpt.dry_run.page import dry_run_json, dry_run_page

    files = read_headers(looked_at)
    with _quiet("megatron", "torch"), ProgressBar("dry run", looked_at.derived.world_size, "ranks") as bar:
        result = dry_run(looked_at.config, looked_at.arch, looked_at.derived, lambda done, _: bar.update(done))
    if as_json:
        click.echo(json.dumps(dry_run_json(result, looked_at, files), indent=1))
    else:
        click.echo(dry_run_page(result, looked_at, files))
    return 0 if result.ok else 1


@contextlib.contextmanager
def _quiet(*packages: str) -> Iterator[None]:
    """Leave out what these say of each rank that is built: it is about speed, which nobody measures here."""
    loggers = [logging.getLogger(package) for package in packages]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for package, logger in zip(packages, loggers, strict=True):
            warnings.filterwarnings("ignore", module=rf"{package}\.")
            logger.setLevel(logging.ERROR)
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
