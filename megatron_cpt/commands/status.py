"""`megatron-cpt status`: where a run stands."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from megatron_cpt.budget import format_count
from megatron_cpt.console import format_seconds
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.status import RunStatus, find_runs, read_status
from megatron_cpt.slurm.queue import QueuedJob, SlurmView, slurm_view


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else; a list without RUN.")
def status(run: Path | None, as_json: bool) -> None:
    """Show the state of the run in the folder RUN: tokens, rate, time left, last checkpoint, restarts, last error.

    Without RUN, list every run below runs/, the one with the newest activity first.
    Reads files, so it works from any machine that sees the folder, whether the run is alive or not. Of a run that was
    submitted to Slurm it also shows the jobs in the queue, every restart with its cause, and the nodes left out.
    """
    if run is None:
        _list_runs(Path("runs"), as_json)
        return
    found, view = read_status(run), slurm_view(RunFolder(run))
    if view is not None and view.waits and found.state != "running":
        found = replace(found, state="queued")
    if as_json:
        click.echo(json.dumps(found.to_json() | {"slurm": view and view.to_json()}, indent=1))
    else:
        click.echo("\n".join([_text(found), *(slurm_lines(view) if view is not None else [])]))


def _list_runs(root: Path, as_json: bool) -> None:
    """One line per run; a run that cannot be read is a line with the reason, and hides no other."""
    if not root.is_dir():
        raise CheckpointError(
            f"there is no folder {root} here: no run was started from this folder",
            hint="megatron-cpt status FOLDER shows a run elsewhere",
        )
    listed: list[dict[str, Any]] = []
    for path in find_runs(root):
        try:
            found = read_status(path)
        except CptError as error:
            listed.append({"run_dir": str(path), "state": "unreadable", "problem": error.message})
            click.echo(f"{path}: {error.message}", err=True)
            continue
        listed.append(found.to_json())
        if not as_json:
            share = found.consumed_tokens / found.train_tokens
            loss = f"loss {_shown(found.loss)}" if found.iteration else ""
            click.echo(f"{found.state:<12} {share:>6.1%} of {format_count(found.train_tokens):<14} {loss:<12} {path}")
    if as_json:
        click.echo(json.dumps(listed, indent=1))
    elif not listed:
        click.echo(f"no run below {root}")


def _text(found: RunStatus) -> str:
    share = found.consumed_tokens / found.train_tokens
    rows = [
        ("state", found.state if found.activity is None else f"{found.state}: {found.activity}"),
        ("tokens", f"{found.consumed_tokens:,} of {found.train_tokens:,} ({share:.1%}), iteration {found.iteration:,}"),
    ]
    if found.iteration:
        rows.append(("loss", _shown(found.loss)))
    rows += [(f"loss on {name}", _shown(loss)) for name, loss in found.validation_loss.items()]
    if found.gate is not None:
        rows.append(("forgetting gate", _gate_text(found.gate)))
    if found.activity == "training" and found.tokens_per_second is not None and found.eta_seconds is not None:
        left = format_seconds(found.eta_seconds)
        rows.append(("rate", f"{found.tokens_per_second:,.0f} tokens/s, {left} left"))
    if found.last_row_seconds_ago is not None:
        rows.append(("last update", f"{format_seconds(found.last_row_seconds_ago)} ago"))
    if found.last_checkpoint is not None:
        saved = found.last_checkpoint
        rows.append(("last checkpoint", f"{saved['path']} at {saved['consumed_tokens']:,} tokens, {saved['created']}"))
    else:
        rows.append(("last checkpoint", "none"))
    rows += [("not usable", problem) for problem in found.unusable_checkpoints]
    rows.append(("starts", f"{found.starts}, {found.steps_done_twice} steps done twice, {found.skipped_steps} skipped"))
    if found.last_error is not None:
        rows.append(("last error", found.last_error))
    lines = [f"{found.job_name} in {found.run_dir}", *(f"  {name:<17} {value}" for name, value in rows)]
    return "\n".join(lines)


def _gate_text(gate: dict[str, Any]) -> str:
    rises = ", ".join(f"{name} {_percent(rise)}" for name, rise in gate["perplexity_increases"].items())
    lowered = "" if gate["rate_factor"] == 1 else f"; learning rate x {gate['rate_factor']:g}"
    return f"{'within' if gate['within'] else 'beyond'} {gate['limit']:.1%}: perplexity of {rises}{lowered}"


def _percent(share: float | str) -> str:
    return f"{share:+.1%}" if isinstance(share, float) else f"is {share}"  # NaN and infinity are text in a row


def slurm_lines(view: SlurmView) -> list[str]:
    """What Slurm says of a run, as lines like those of the run's own state."""
    rows = [("slurm job", _job_text(job)) for job in view.jobs]
    if not rows:
        rows = [("slurm job", view.problem or "none in the queue")]
    for start in view.restarts:
        when = datetime.datetime.fromtimestamp(start["began"], datetime.UTC).isoformat(timespec="seconds")
        what = start["cause"] or "no end is noted"
        then = {"requeue": "; started again", "hand_over": "; the next job continues"}.get(start["action"] or "", "")
        rows.append((f"start {start['job']}.{start['restart']}", f"{when} on {_nodes(start['nodes'])}: {what}{then}"))
    rows += [("excluded", f"{node}: {reason}") for node, reason in view.excluded_nodes.items()]
    return [f"  {name:<17} {value}" for name, value in rows]


def _job_text(job: QueuedJob) -> str:
    if job.state == "PENDING":
        starts = "" if job.starts_at in ("", "N/A") else f", expected to start at {job.starts_at}"
        return f"{job.job} waits: {job.reason}{starts}"
    return f"{job.job} {job.state.lower()} on {job.nodes}, {job.time_left} left"


def _nodes(nodes: list[str] | None) -> str:
    listed = nodes or ["an unknown node"]
    return ", ".join(listed if len(listed) < 6 else [*listed[:3], f"and {len(listed) - 3} more"])


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
