"""`megatron-cpt submit`: a run, a corpus, a conversion or an evaluation as a job of a Slurm cluster."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from megatron_cpt.config.load import build_config
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.console import print_summary
from megatron_cpt.corpus.dataset.manifest import idx_path, manifest_path
from megatron_cpt.corpus.schema import parse_corpus
from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm import submission
from megatron_cpt.slurm.site import Site, read_site
from megatron_cpt.slurm.submission import Submission

COMMANDS = {"convert": "megatron_cpt.commands.convert:convert", "eval": "megatron_cpt.commands.eval:eval_group"}


@dataclass(frozen=True)
class Shape:
    """What a job asks for beyond the site's own; None: what fits the kind of job."""

    chain: int
    max_restarts: int
    tasks: tuple[str, ...]  # of a corpus how many, of `eval tasks` which
    cpus_per_task: int | None
    memory_gib: int | None
    gpus: int | None


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("target", metavar="CONFIG|CORPUS.yaml|convert|eval")
@click.argument("arguments", metavar="[KEY=VALUE | arguments of the command]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--dry-run", is_flag=True, help="Check everything and print the batch script; submit nothing.")
@click.option("--cluster-env", type=click.Path(path_type=Path), help="The site's file.  [default: slurm/cluster.env]")
@click.option("--time", "time_limit", help="Time limit as Slurm writes it: 12:00:00, 7-00:00:00.")
@click.option("--partition", help="Instead of SBATCH_PARTITION of the site's file.")
@click.option("--account", help="Instead of SBATCH_ACCOUNT.")
@click.option("--qos", help="Instead of SBATCH_QOS.")
@click.option("--chain", type=click.IntRange(1, 1000), default=1, help="A run: jobs to queue one after another.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=50, show_default=True, help="A run: of one job.")
@click.option("--tasks", multiple=True, help="A corpus: array tasks.  [default: 16]  `eval tasks`: their names.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="[default: 16 for a corpus, else 8]")
@click.option("--memory-gib", type=click.IntRange(min=1), help="A command: memory.  [default: 8; with GPUs 64]")
@click.option("--gpus", type=click.IntRange(min=0), help="A command: GPUs.  [default: 0; eval: 1]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def submit(
    target: str,
    arguments: tuple[str, ...],
    dry_run: bool,
    cluster_env: Path | None,
    time_limit: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    as_json: bool,
    **shape: Any,
) -> None:
    """Submit a job to Slurm: the run of CONFIG, a corpus, a conversion, an evaluation.

    \b
      megatron-cpt submit config.yaml budget.train_tokens=3B --time 2-00:00:00
      megatron-cpt submit corpus.yaml --tasks 32
      megatron-cpt submit convert runs/JOB export/JOB --to hf
      megatron-cpt submit eval perplexity export/JOB --data data/domain_valid
    Everything is checked first; after an error (exit code 2) nothing is written and nothing is in the queue. A run's
    script is RUN/submit.sbatch: sbatch it to continue the run.
    """
    site = submission.with_options(
        read_site(cluster_env), time_limit=time_limit, partition=partition, account=account, qos=qos
    )
    made = _submission(target, arguments, site, Shape(**shape))
    if dry_run:
        print_summary(json.dumps({"folder": str(made.folder), "script": made.text}) if as_json else made.text)
        return
    jobs = submission.submit(made, site)
    script = made.scripts[0][0]
    if as_json:
        print_summary(json.dumps({"jobs": jobs, "folder": str(made.folder), "script": str(script)}))
    else:
        print_summary(f"submitted job {', '.join(jobs)}; script {script}, logs in {made.folder}/logs")


def _submission(target: str, arguments: Sequence[str], site: Site, shape: Shape) -> Submission:
    if target in COMMANDS:
        return _command(target, arguments, site, shape)
    unknown = [word for word in arguments if word.startswith("-")]
    if unknown:
        raise click.UsageError(f"no such option: {unknown[0]}")
    raw = read_yaml(Path(target))
    if not {"sources", "output_prefix"} & raw.keys():
        config = build_config(raw, arguments, origin=target)
        return submission.training(config, target, site, chain=shape.chain, max_restarts=shape.max_restarts)
    if arguments:
        raise click.UsageError(f"{arguments[0]}: {target} is a corpus, which takes no KEY=VALUE")
    corpus = parse_corpus(raw, target)
    cpus, tasks = shape.cpus_per_task or 16, _array_tasks(shape.tasks)
    return submission.preprocessing(corpus, Path(target), site, tasks=tasks, cpus_per_task=cpus)


def _array_tasks(given: tuple[str, ...]) -> int:
    allowed: Any = click.IntRange(1, 10_000)
    try:
        return int(allowed.convert(given[-1] if given else 16, None, None))
    except click.BadParameter as error:
        raise click.UsageError(f"--tasks: {error.message}") from error


def _command(target: str, arguments: Sequence[str], site: Site, shape: Shape) -> Submission:
    """Check the arguments as the command itself would; a conversion is planned, which reads its source's index."""
    module, function = COMMANDS[target].split(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    words, own = [target], [*arguments, *(word for names in shape.tasks for word in ("--tasks", names))]
    while isinstance(command, click.Group):
        name, following, own = command.resolve_command(click.Context(command), own)
        assert name is not None and following is not None
        command, words = following, [*words, name]
    context = command.make_context(" ".join(words), list(own))
    if target == "convert":
        folder = Path(f"{context.params['dst']}.slurm")
        with contextlib.redirect_stdout(None):
            command.invoke(command.make_context(target, [*own, "--dry-run"]))
    else:
        model: Path = context.params["model"]
        if not model.exists():
            raise LaunchError(f"{model} does not exist", hint="give a Hugging Face directory, a checkpoint or a run")
        for name in context.params.get("data", ()):
            if not (Path(name).exists() or manifest_path(name).exists() or idx_path(name).exists()):
                raise LaunchError(f"{name} does not exist", hint="give the prefix of a dataset, or a text file")
        folder = Path(f"{'-'.join(words)}-{model.absolute().name}.slurm")
    gpus = shape.gpus if shape.gpus is not None else (1 if target == "eval" else 0)
    return submission.command(
        words,
        own,
        site,
        folder=folder,
        cpus_per_task=shape.cpus_per_task or 8,
        memory_gib=shape.memory_gib or (64 if gpus else 8),
        gpus=gpus,
        takes_workers=target == "convert",
    )
