"""What came of it: a table on the terminal, report.png with the curves, and report.json with every number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.runs.task_results import Estimate, shown_estimate

SETS = {"domain": "medical_valid", "general": "general_valid"}  # name in the config -> dataset
TITLES = {"domain": "domain: medical", "general": "general: The World Factbook"}


def show(work: Path, state: dict[str, dict[str, Any]], console: Console) -> None:
    """Write report.json and report.png into `work` and print the table, a sample and what to do next."""
    metrics = read_metrics(work / "run" / "metrics.jsonl")
    numbers = collect(work, state, metrics)
    (work / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw(metrics, work / "report.png")
    console.print()
    console.print(perplexity_table(numbers))
    domain = numbers["perplexity"]["domain"]
    console.print(
        f"In the domain, Megatron-Core measured {domain['after_in_loop']:,.2f} in the training loop, transformers "
        f"{domain['after']:,.2f} on the exported model.\n",
        highlight=False,
    )
    console.print(tasks_table(numbers))
    console.print(f"{numbers['tasks']['conclusion']}; in brackets 95 % intervals\n", highlight=False)
    console.print(cost_table(numbers))
    generated = numbers["generated"]
    console.print(f"\nThe prompt [bold]{generated['prompt'].strip()}[/bold], continued greedily", highlight=False)
    for moment, text in (("before", generated["before"]), ("after", generated["after"])):
        console.print(f"  [bold]{moment:<6}[/bold] {' '.join(text.split())}", highlight=False, markup=True)
    console.print(f"\nThe curves are in {work / 'report.png'}, all numbers in {work / 'report.json'}.")
    console.print(f"The page about the run, for whoever decides: {work / 'run' / 'report.html'}", highlight=False)
    console.print(NEXT.format(export=work / "export"), highlight=False)


NEXT = """
Now your own corpus and model:
  make preprocess CORPUS=examples/medical/corpus.yaml      edit a copy: your files, your tokenizer
  make plan       CONFIG=examples/quickstart/config.yaml   edit a copy: your model, budget and layout
  make train      CONFIG=...
  make convert    RUN=runs/JOB_NAME
The model of this run is an ordinary Hugging Face directory: {export}"""


def collect(work: Path, state: dict[str, dict[str, Any]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """All results in one mapping: perplexity per set before and after, cost per step, the generated texts."""
    results = {name: json.loads((work / "results" / f"{name}.json").read_text()) for name in ("before", "after")}
    generated = json.loads((work / "results" / "generated.json").read_text())
    perplexity = {}
    for name, dataset in SETS.items():
        row = {moment: _of_dataset(results[moment], dataset) for moment in results}
        change = row["after"]["perplexity"] / row["before"]["perplexity"] - 1
        perplexity[name] = {
            "before": row["before"]["perplexity"],
            "after": row["after"]["perplexity"],
            "change_ratio": change,
            "after_in_loop": validation_curve(metrics, name)[-1][1],
            "tokens": row["after"]["tokens"],
            "documents": row["after"]["documents"],
        }
    before, after = generated["completions"].values()
    return {
        "perplexity": perplexity,
        "plan": json.loads((work / "results" / "plan.json").read_text()),
        "steps": {title: {k: v for k, v in record.items() if k != "fingerprint"} for title, record in state.items()},
        "tasks": _tasks(json.loads((work / "results" / "tasks.json").read_text())),
        "generated": {"prompt": generated["prompt"], "before": before, "after": after},
    }


def _tasks(told: dict[str, Any]) -> dict[str, Any]:
    rows = told["rows"]
    tested = next(row for row in rows if row["is_primary"])
    verdict = f"{tested['verdict']} (p = {tested['p_value']:.3g}, {tested['test']})"
    return {"rows": rows, "conclusion": f"{tested['task']}: {tested['metric']}, named beforehand: {verdict}"}


def _of_dataset(measured: dict[str, Any], dataset: str) -> dict[str, Any]:
    return next(result for result in measured["results"] if Path(result["data"]).name == dataset)


def validation_curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(tokens consumed, perplexity) of a validation set, as the training loop measured it."""
    rows = [row for row in metrics if row.get("event") == "validation" and row["name"] == name]
    return [(row["consumed_tokens"], row["perplexity"]) for row in rows]


def perplexity_table(numbers: dict[str, Any]) -> Table:
    trained = numbers["plan"]["train_tokens"]
    table = Table(title=f"Perplexity on held-out documents, {trained:,} tokens of training", title_justify="left")
    for column in ("", "before", "after", "change", "tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in numbers["perplexity"].items():
        table.add_row(
            TITLES[name],
            f"{row['before']:,.2f}",
            f"{row['after']:,.2f}",
            f"{100 * row['change_ratio']:+.1f} %",
            f"{row['tokens']:,}",
        )
    return table


def tasks_table(numbers: dict[str, Any]) -> Table:
    table = Table(title="Four-choice items out of held-out documents", title_justify="left")
    for column in ("", "items", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for row in numbers["tasks"]["rows"]:
        shown = [shown_estimate(Estimate(**row[key]), sign=key == "difference") for key in _MOMENTS]
        table.add_row(f"{row['task']}: {row['metric']}", f"{row['items']:,}", *shown)
    return table


_MOMENTS = ("before", "after", "difference")


def cost_table(numbers: dict[str, Any]) -> Table:
    table = Table(title="Cost", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("CPU seconds", justify="right")
    table.add_column("peak memory, MB", justify="right")
    records = numbers["steps"]
    for title, record in records.items():
        megabytes = record["peak_memory_bytes"] / 1e6
        table.add_row(title, f"{record['seconds']:.1f}", f"{record['cpu_seconds']:.1f}", f"{megabytes:,.0f}")
    totals = [sum(record[unit] for record in records.values()) for unit in ("seconds", "cpu_seconds")]
    table.add_section()
    table.add_row("all", *(f"{total:.0f}" for total in totals), "")
    return table


def draw(metrics: list[dict[str, Any]], path: Path) -> None:
    """Left: training loss against tokens. Right: perplexity of both held-out sets against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [row for row in metrics if "event" not in row]
    left.plot([s["consumed_tokens"] for s in steps], [s["loss"] for s in steps], color="tab:blue")
    left.set(title="Training loss", xlabel="tokens consumed", ylabel="nats per token")
    curves = {name: validation_curve(metrics, name) for name in SETS}
    for (name, points), color in zip(curves.items(), ("tab:green", "tab:orange"), strict=True):
        right.plot(*zip(*points, strict=True), marker="o", color=color, label=TITLES[name])
        for point, offset in ((points[0], (6, 6)), (points[-1], (-30, 8))):
            right.annotate(f"{point[1]:,.1f}", point, textcoords="offset points", xytext=offset, color=color)
    right.set(title="Held-out perplexity", xlabel="tokens consumed")
    values = [value for points in curves.values() for _, value in points]
    if max(values) > 20 * min(values):
        right.set_yscale("log")
    else:
        right.set_ylim(0, 1.15 * max(values))
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
