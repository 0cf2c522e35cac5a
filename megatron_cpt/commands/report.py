"""`megatron-cpt report`: one page on what a run did."""

from __future__ import annotations

import json
from pathlib import Path

import click

from megatron_cpt.report.write import write_report


@click.command()
@click.argument("roots", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    metavar="PREFIX",
    type=click.Path(path_type=Path),
    help="Write PREFIX.html, PREFIX.md and PREFIX.png.  [default: RUN/report; of several runs ./report]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def report(roots: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Write one page on a run, or on several side by side: what it gained and lost, and what that cost.

    A sentence for who decides, then losses before and after, data, time, incidents, checkpoints, the config and the
    commands that do it again. The HTML is self-contained. It works at any time: of a run that is not finished, was
    restarted or diverged it says so.
    """
    prefix = output or (roots[0] / "report" if len(roots) == 1 else Path("report"))
    written = write_report(list(roots), prefix)
    if as_json:
        click.echo(json.dumps({"files": [str(path) for path in written]}))
    else:
        click.echo("\n".join(f"wrote {path}" for path in written))
