"""Batch scripts as text: pure functions of what a job is and what the site fixes. `slurm/` holds their output."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm.site import CLUSTER_ENV, Site
from megatron_cpt.slurm.time_limit import format_time_limit

MOST_RESTARTS = 50

Directive = tuple[str, str | None]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,  # shell, not HTML; every value that a user gives is quoted by `_quoted` or `_option`
    comment_start_string="{##",  # ${#array[@]} is shell
    comment_end_string="##}",
)


@dataclass(frozen=True)
class Place:
    """Where a script runs: for a script of the repository the folder it is submitted from, else absolute."""

    usage: str  # how the script is submitted
    output: str  # with sbatch's patterns, see `literal`
    chdir: str | None = None
    excluded: Sequence[str] = ()


@dataclass(frozen=True)
class TrainJob:
    """A run on nodes x gpus_per_node."""

    name: str
    config: str
    nodes: int
    gpus_per_node: int
    time_limit_seconds: int | None  # None: that of the partition
    notice_seconds: int
    max_restarts: int = MOST_RESTARTS


@dataclass(frozen=True)
class ArrayJob:
    """A corpus over `tasks` array tasks, then the joining job."""

    name: str
    corpus: str
    tasks: int
    cpus_per_task: int
    time_limit_seconds: int | None
    stage: str | None = None  # parts, join; None: parts, whose first task submits the join


@dataclass(frozen=True)
class CommandJob:
    """One `megatron-cpt` command on one node; `arguments` None: those of the script."""

    name: str
    command: Sequence[str]
    arguments: Sequence[str] | None
    cpus_per_task: int
    memory_gib: int
    gpus: int
    time_limit_seconds: int | None
    usage_arguments: str = ""
    takes_workers: bool = False  # the command has --workers


def train_script(job: TrainJob, site: Site, place: Place) -> str:
    """The batch script of a training run."""
    directives: list[Directive] = [
        ("nodes", str(job.nodes)),
        ("ntasks-per-node", str(job.gpus_per_node)),
        ("gpus-per-node", str(job.gpus_per_node)),
        ("exclusive", None),
        ("mem", "0"),
        *_time(job.time_limit_seconds),
        ("signal", f"B:USR1@{job.notice_seconds}"),
    ]
    return _render(
        "train.sbatch.jinja",
        _directives(job.name, directives, site, place),
        title=f"Continued pre-training on {job.nodes} node{'s' if job.nodes > 1 else ''} x {job.gpus_per_node} GPUs.",
        usage=place.usage,
        config=_quoted(job.config),
        cluster_env=_quoted(site.cluster_env),
        max_restarts=job.max_restarts,
    )


def array_script(job: ArrayJob, site: Site, place: Place) -> str:
    """The batch script of a corpus."""
    directives: list[Directive] = [
        ("nodes", "1"),
        ("ntasks", "1"),
        ("cpus-per-task", str(job.cpus_per_task)),
        ("mem-per-cpu", "2G"),
        *_time(job.time_limit_seconds),
        *([] if job.stage == "join" else [("array", f"0-{job.tasks - 1}")]),
    ]
    return _render(
        "preprocess.sbatch.jinja",
        _directives(job.name, directives, site, place),
        usage=place.usage,
        corpus=job.corpus and _quoted(job.corpus),
        stage=job.stage or "",
        cluster_env=_quoted(site.cluster_env),
    )


def command_script(job: CommandJob, site: Site, place: Place) -> str:
    """The batch script of one command, which a requeued job continues or repeats."""
    directives: list[Directive] = [
        ("nodes", "1"),
        ("ntasks", "1"),
        ("cpus-per-task", str(job.cpus_per_task)),
        *([("gpus-per-node", str(job.gpus))] if job.gpus else []),
        ("mem", f"{job.memory_gib}G"),
        *_time(job.time_limit_seconds),
    ]
    return _render(
        "command.sbatch.jinja",
        _directives(job.name, directives, site, place),
        command=shlex.join(job.command),
        arguments=None if job.arguments is None else shlex.join(job.arguments),
        workers=job.takes_workers,
        usage=place.usage,
        usage_arguments=job.usage_arguments,
        cluster_env=_quoted(site.cluster_env),
    )


def literal(path: str) -> str:
    """`path` as part of an output pattern: sbatch would expand its percent signs."""
    return path.replace("%", "%%")


def _time(limit_seconds: int | None) -> list[Directive]:
    return [] if limit_seconds is None else [("time", format_time_limit(limit_seconds))]


def _directives(name: str, own: Sequence[Directive], site: Site, place: Place) -> list[Directive]:
    found: list[Directive] = [("job-name", name), *site.directives(), *own]
    found += [("requeue", None), ("open-mode", "append"), ("output", place.output)]
    if place.chdir is not None:
        found.append(("chdir", place.chdir))
    if place.excluded:
        found.append(("exclude", ",".join(place.excluded)))
    return [(option, None if value is None else _option(option, value)) for option, value in found]


def _option(name: str, value: str) -> str:
    """`value` on a line `#SBATCH --name=`, which ends at the line's end and knows double quotes."""
    if any(ord(letter) < 32 or letter in "\"'\\" for letter in value):
        raise LaunchError(
            f"{name} {value!r} cannot stand in a batch script", hint="use a name without quotes and backslashes"
        )
    return f'"{value}"' if " " in value or "#" in value else value


def _quoted(value: str) -> str:
    """`value` for the shell, also within ${NAME:-...}."""
    return shlex.quote(value)


def _render(template: str, directives: Sequence[Directive], **values: Any) -> str:
    text = _TEMPLATES.get_template(template).render(directives=directives, **values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def shipped_scripts() -> dict[str, str]:
    """The files of the repository's folder slurm/, by name; `make docs` writes them."""
    site = Site(cluster_env=CLUSTER_ENV)
    seven_days, half_a_day, four_hours = 7 * 86_400, 43_200, 14_400
    train = TrainJob("qwen2-72b-cpt", "examples/qwen2_72b/config.yaml", 4, 8, seven_days, notice_seconds=540)
    corpus = ArrayJob("preprocess", "", 16, 16, half_a_day)
    convert = CommandJob(
        "convert", ("convert",), None, 8, 8, 0, four_hours, "SRC DST --to hf|torch_dist|legacy [options]", True
    )
    return {
        "qwen2_72b_cpt.sbatch": train_script(train, site, Place("slurm/qwen2_72b_cpt.sbatch", "%x-%j.log")),
        "preprocess.sbatch": array_script(corpus, site, Place("slurm/preprocess.sbatch", "%x-%A_%a.log")),
        "convert.sbatch": command_script(convert, site, Place("slurm/convert.sbatch", "%x-%j.log")),
    }
