"""What the runs of the study measured: kept as JSON, shown as a table, a picture and a page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import jinja2
from rich.console import Console
from rich.table import Table

from megatron_cpt.durable import write_atomically

DOMAIN = "medical"
GENERAL = ("facts", "reference", "fiction")  # near, middle and far of what is replayed
UNSEEN = ("reference", "fiction")  # of a kind that no setting trains on
HEADER = (
    "setting", "tokens, all", "domain gain", "kept", *(f"{name}: change" for name in GENERAL),
    "general rise", "spared", "spared, unseen kinds",
)  # fmt: skip
_PRINTED = (0, 3, 7, 8, 9)  # columns that a terminal has room for
BASE = "vanilla"

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What helps against forgetting</title>
<style>
 :root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
 div { overflow-x: auto } table { border-collapse: collapse } td, th { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884 }
 td:first-child, th:first-child { text-align: left } img { max-width: 100%; background: white }
</style>
<h1>What helps against forgetting</h1>
<p>{{ caption }}</p>
<div><table><tr>{% for title in header %}<th>{{ title }}{% endfor %}
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}{% endfor %}
{% endfor %}</table></div>
<p><img alt="domain loss against general loss of each setting" src="data:image/png;base64,{{ picture }}">
"""  # noqa: E501
CAPTION = (
    "Losses in nats per token, held-out text; means over {seeds} seed(s), in brackets least and most. Domain gain: how "
    "far the loss on medical text fell. Change: of the loss on text of the kind that is replayed (facts), of prose "
    "about a programming language (reference) and of novels (fiction). General rise: the mean of the three. Kept and "
    "spared: against the setting without any remedy, seed by seed."
)


@dataclass(frozen=True)
class Row:
    """One run, or one average of weights. Losses are in nats per token, by set."""

    name: str
    title: str
    seed: int
    domain_tokens: int
    train_tokens: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float

    @property
    def gain(self) -> float:
        return self.before[DOMAIN] - self.after[DOMAIN]

    def rise(self, sets: Sequence[str] = GENERAL) -> float:
        return fmean(self.after[name] - self.before[name] for name in sets)


def read(path: Path) -> list[Row]:
    """Return the rows that are kept in `path`; none where it does not exist."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """Keep `rows` in `path`."""
    write_atomically(path, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


def show(work: Path, rows: Sequence[Row], console: Console) -> None:
    """Print the table and write results.md, results.html and results.png into `work`."""
    lines = table(rows)
    caption = CAPTION.format(seeds=len({row.seed for row in rows}))
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *lines))
    picture = draw(rows)
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        caption=caption, header=HEADER, lines=lines, picture=base64.b64encode(picture).decode()
    )  # fmt: skip
    write_atomically(work / "results.md", f"{caption}\n\n{markdown}\n".encode())
    write_atomically(work / "results.html", page.encode())
    write_atomically(work / "results.png", picture)
    shown = Table(*(HEADER[column] for column in _PRINTED))
    for line in lines:
        shown.add_row(*(line[column] for column in _PRINTED))
    console.print(shown)
    console.print(f"{work}/results.md, results.html, results.png")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per setting, the cells as text."""
    vanilla = {row.seed: row for row in rows if row.name == BASE}
    return [_line(list(group), vanilla) for group in _by_name(rows)]


def _by_name(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return list(groups.values())


def _line(group: list[Row], vanilla: dict[int, Row]) -> list[str]:
    pairs = [(row, vanilla[row.seed]) for row in group]
    return [
        group[0].title,
        f"{round(fmean(row.train_tokens for row in group)):,}",
        _range([row.gain for row in group]),
        _share([row.gain / other.gain for row, other in pairs if other.gain > 0]),
        *(_range([row.after[name] - row.before[name] for row in group], "+.3f") for name in GENERAL),
        _range([row.rise() for row in group], "+.3f"),
        *(
            _share([1 - row.rise(sets) / other.rise(sets) for row, other in pairs if other.rise(sets) > 0])
            for sets in (GENERAL, UNSEEN)
        ),
    ]


def _range(values: Sequence[float], form: str = ".3f") -> str:
    mean = f"{fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def _share(values: Sequence[float]) -> str:
    """A share; without one where there is nothing to compare with."""
    return _range(values, ".0%") if values else "-"


def draw(rows: Sequence[Row]) -> bytes:
    """Domain loss against general loss of each setting, as PNG; bars from the least to the most of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    before = rows[0].before
    level = fmean(before[name] for name in GENERAL)
    axes.axhline(level, color="black", linestyle="--", label=f"the base model, {before[DOMAIN]:.2f} on the domain")
    for number, group in enumerate(_by_name(rows)):
        domain = [row.after[DOMAIN] for row in group]
        general = [fmean(row.after[name] for name in GENERAL) for row in group]
        x, y = fmean(domain), fmean(general)
        axes.errorbar(
            x, y,
            xerr=[[x - min(domain)], [max(domain) - x]], yerr=[[y - min(general)], [max(general) - y]],
            fmt="osD^vP*X"[number % 8], color=f"C{number}", capsize=3, label=group[0].title,
        )  # fmt: skip
    axes.set_xlabel("loss on the domain, nats per token")
    axes.set_ylabel("loss on general text, mean of three sets")
    axes.set_title("left is learned, down is kept", loc="left")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
