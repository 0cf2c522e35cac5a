"""Writes PREFIX.html (self-contained), PREFIX.md and PREFIX.png."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from megatron_cpt import __version__
from megatron_cpt.budget import format_count
from megatron_cpt.durable import write_output
from megatron_cpt.report.facts import RunFacts, read_facts
from megatron_cpt.report.figures import curves
from megatron_cpt.runs.checkpoints import format_bytes
from megatron_cpt.runs.task_results import shown_estimate


def write_report(roots: Sequence[Path], prefix: Path) -> list[Path]:
    """Write the report of the runs in `roots`. Return the files: HTML, Markdown and PNG.

    Raises:
        CheckpointError: one is not a run folder.
        ConfigError: its resolved.yaml is not a config of this version, or matplotlib is not installed.
        UserError: a file cannot be written.
    """
    runs = [read_facts(root) for root in roots]
    pictures = curves([(run.name, run.rows) for run in runs], ("svg", "png"))
    svg = pictures["svg"].decode()
    paths = [prefix.with_name(prefix.name + ending) for ending in (".html", ".md", ".png")]
    contents = [
        _rendered("report.html.jinja", runs, svg=svg[svg.index("<svg") :]).encode(),
        _rendered("report.md.jinja", runs, picture=paths[2].name).encode(),
        pictures["png"],
    ]
    for path, content in zip(paths, contents, strict=True):
        write_output(path, content, hint="--output names another place")
    return paths


def _rendered(template: str, runs: Sequence[RunFacts], **values: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
    )
    environment.filters |= {
        "count": format_count,
        "bytes": format_bytes,
        "loss": _loss,
        "cell": _cell,
        "estimate": shown_estimate,
    }
    return environment.get_template(template).render(
        runs=runs,
        version=__version__,
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        title=", ".join(run.name for run in runs),
        **values,
    )


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _cell(text: object) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())
