"""Curves of runs as pictures: losses, validation, learning rate and speed over tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.durable import write_output
from megatron_cpt.errors import ConfigError
from megatron_cpt.runs.comparison import validation_rows
from megatron_cpt.runs.metrics import Row, finite

NamedRows = tuple[str, Sequence[Row]]  # what a run is called, and its rows that count

_COLOURS = ("#2f6fb3", "#c26a3d", "#2e8b57", "#8a5ab5", "#b33a3a", "#6f6f2a", "#138a96", "#a8457f")
_MOST_POINTS = 2_000  # of a line


def write_curves(runs: Sequence[NamedRows], path: Path) -> None:
    """Draw the curves of `runs` into one file, PNG or SVG by its ending.

    Raises:
        ConfigError: another ending; matplotlib is not installed.
        UserError: the file cannot be written.
    """
    form = path.suffix[1:]
    if form not in ("png", "svg"):
        raise ConfigError(f"{path}: a picture is a file that ends in .png or .svg", hint="--picture compared.png")
    write_output(path, curves(runs, (form,))[form], hint="name a file in a folder that can be written")


def curves(runs: Sequence[NamedRows], forms: Sequence[str]) -> dict[str, bytes]:
    """Return the picture of the curves of `runs` in each of `forms`: png, svg.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib", hint="pip install 'megatron-cpt[plots]'") from error
    with mpl.rc_context({"svg.hashsalt": "megatron-cpt", "font.size": 9}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        _draw(figure, runs)
        return {form: _saved(figure, form) for form in forms}


def _draw(figure: Any, runs: Sequence[NamedRows]) -> None:
    (loss, validation), (rate, speed) = figure.subplots(2, 2)
    for index, (name, rows) in enumerate(runs):
        steps = [row for row in rows if "event" not in row]
        colour = _COLOURS[index % len(_COLOURS)]
        _line(loss, steps, "loss", colour, name)
        _line(rate, steps, "lr", colour, name)
        _line(speed, steps, "tokens_per_second", colour, name)
        for place, (kind, measured) in enumerate(validation_rows(rows).items()):
            style = ("-", "--", ":", "-.")[place % 4]
            _line(validation, measured, "loss", colour, f"{name}: {kind}" if len(runs) > 1 else kind, style, "o")
    titles = ("training loss", "validation loss", "learning rate", "tokens per second")
    for axes, title in zip((loss, validation, rate, speed), titles, strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlabel("tokens")
        axes.grid(visible=True, alpha=0.3)
    if validation.lines:
        validation.legend(fontsize=8)
    if len(runs) > 1:
        loss.legend(fontsize=8)


def _saved(figure: Any, form: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _line(
    axes: Any, rows: Sequence[Row], key: str, colour: str, label: str, style: str = "-", marker: str = ""
) -> None:
    points = [(row["consumed_tokens"], value) for row in rows if (value := finite(row.get(key))) is not None]
    if points:
        step = max(1, len(points) // _MOST_POINTS)
        tokens, values = zip(*points[::step], strict=True)
        axes.plot(tokens, values, style, color=colour, label=label, linewidth=1.3, marker=marker, markersize=4)
