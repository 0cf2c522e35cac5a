"""What a run's folder says of the weights that are exported: validation before and after, and downstream tasks."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_cpt.runs.comparison import validation_changes
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.task_results import newest_task_rows, shown_estimate

_LARGEST_LOSS = 700.0  # whose perplexity is a number


def evaluation_rows(run: Path, iteration: int | None) -> list[str]:
    """Return Markdown tables of what was measured of the weights of `iteration`; empty when nothing was.

    Later measurements are of other weights and left out.
    """
    rows = read_metrics(RunFolder(run).metrics)
    known = [row for row in rows if iteration is None or int(row.get("iteration") or 0) <= iteration]
    lines = []
    changes = {name: change for name, change in validation_changes(known).items() if change.last is not None}
    if changes:
        lines += ["| held-out perplexity | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {_perplexity(c.first)} | {_perplexity(c.last)} |" for name, c in changes.items()]
    tasks = [row for row in newest_task_rows(run) if row.iteration == iteration]
    if tasks:
        lines += ["", "| task | items | before | after | change | |", "|---|---|---|---|---|---|"]
        for row in tasks:
            cells = [f"{row.items:,}", shown_estimate(row.before) or "–", shown_estimate(row.after)]
            cells += [shown_estimate(row.difference, sign=True) or "–", row.conclusion]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        lines += [
            "",
            "In brackets 95 % intervals; one metric was named beforehand and tested, in pairs of the same items.",
        ]
    return lines


def _perplexity(loss: float | None) -> str:
    return "–" if loss is None or loss > _LARGEST_LOSS else f"{math.exp(loss):,.2f}"
