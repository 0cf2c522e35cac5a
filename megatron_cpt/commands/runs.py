"""`megatron-cpt runs`: the runs of a folder, compared, and how their configs differ."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import click

from megatron_cpt.budget import format_count
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.report.figures import write_curves
from megatron_cpt.runs.comparison import ComparedRun, compared_run
from megatron_cpt.runs.folder import RunFolder, config_changes, read_resolved, resolved_dict
from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.status import find_runs


class _ListByDefault(click.Group):
    """A group whose first word may be a folder instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if not {"-h", "--help"} & set(args) and (not words or words[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListByDefault, subcommand_metavar="[ROOT | COMMAND [ARGS]...]")
def runs() -> None:
    """List the runs below ROOT [default: runs], compare them, or show how their configs differ.

    \b
      megatron-cpt runs experiments --json
      megatron-cpt runs compare runs/a runs/b --picture compared.png
      megatron-cpt runs diff runs/a runs/b
    """


@runs.command("list")
@click.argument("root", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="One JSON list on stdout, nothing else.")
def list_command(root: Path, as_json: bool) -> None:
    """List every run below ROOT, the one with the newest activity first."""
    if not root.is_dir():
        raise CheckpointError(f"there is no folder {root}", hint="megatron-cpt runs FOLDER lists the runs elsewhere")
    rows: list[dict[str, Any]] = []
    for path in find_runs(root):
        try:
            run = compared_run(path, read_metrics(RunFolder(path).metrics))
        except CptError as error:  # it hides no other
            rows.append({"name": path.name, "run_dir": str(path), "state": "unreadable", "problem": error.message})
            continue
        last = {name: change.last for name, change in run.validation.items()}
        rows.append(run.to_json() | {"validation": last, "updated": _updated(path)})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(_line(row))
    if not rows:
        click.echo(f"no run below {root}")


@runs.command("compare")
@click.argument("roots", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw their losses: FILE.png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list on stdout, nothing else.")
def compare_command(roots: tuple[Path, ...], picture: Path | None, as_json: bool) -> None:
    """Show runs side by side: tokens, speed, and the losses before and after on every validation set."""
    rows = [read_metrics(RunFolder(root).metrics) for root in roots]
    found = [compared_run(root, its_rows) for root, its_rows in zip(roots, rows, strict=True)]
    if picture is not None:
        write_curves([(root.name, its_rows) for root, its_rows in zip(roots, rows, strict=True)], picture)
    if as_json:
        click.echo(json.dumps([run.to_json() for run in found], indent=1))
        return
    click.echo(_table(found))
    if picture is not None:
        click.echo(f"wrote {picture}")


@runs.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON list on stdout, nothing else.")
def diff_command(first: Path, second: Path, as_json: bool) -> None:
    """Show every key of the config that differs between two runs, with both values."""
    before, after = (resolved_dict(read_resolved(RunFolder(path))) for path in (first, second))
    changes = config_changes(before, after)
    if as_json:
        click.echo(json.dumps([{"path": c.path, "first": c.old, "second": c.new} for c in changes], indent=1))
    elif changes:
        click.echo("\n".join(str(change) for change in changes))
    else:
        click.echo("the configs are the same")


def _updated(path: Path) -> str | None:
    """When the run last wrote a row."""
    metrics = RunFolder(path).metrics
    try:
        return datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    except OSError:
        return None


def _line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"{row['state']:<12} {row['run_dir']}: {' '.join(row['problem'].split())}"
    share = row["consumed_tokens"] / row["train_tokens"]
    losses = "  ".join(f"{name} {_loss(loss)}" for name, loss in row["validation"].items())
    return (
        f"{row['state']:<12} {share:>6.1%} of {format_count(row['train_tokens']):<10} loss {_loss(row['loss']):<9} "
        f"{losses:<32} {row['updated'] or 'never':<26} {row['run_dir']}"
    ).rstrip()


def _table(found: list[ComparedRun]) -> str:
    """One column per run, as they were given."""
    rows = [
        ("", [Path(run.run_dir).name for run in found]),
        ("state", [run.state for run in found]),
        ("tokens", [f"{format_count(r.consumed_tokens)} of {format_count(r.train_tokens)}" for r in found]),
        ("hours in steps", [f"{run.step_hours:,.2f}" for run in found]),
        ("tokens/s", ["–" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}" for r in found]),
        ("loss", [_loss(run.loss) for run in found]),
    ]
    for name in dict.fromkeys(name for run in found for name in run.validation):
        rows.append((f"loss on {name}", [_change(run, name) for run in found]))
        rows.append((f"perplexity on {name}", [_perplexities(run, name) for run in found]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(found))]
    head = max(len(title) for title, _ in rows)
    return "\n".join(
        f"{title:<{head}}  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for title, cells in rows
    )


def _change(run: ComparedRun, name: str) -> str:
    if name not in run.validation:
        return "–"
    change = run.validation[name]
    return f"{_loss(change.first)} -> {_loss(change.last)}"


def _perplexities(run: ComparedRun, name: str) -> str:
    change = run.validation.get(name)
    if change is None or change.first is None or change.last is None or max(change.first, change.last) > 700:
        return "–"
    return (
        f"{math.exp(change.first):,.2f} -> {math.exp(change.last):,.2f} ({math.expm1(change.last - change.first):+.1%})"
    )


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
