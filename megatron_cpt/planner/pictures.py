"""Pictures of a plan: memory of each stage, one step of the pipeline, and what changes over the tokens of the run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_cpt.durable import write_output
from megatron_cpt.errors import ConfigError
from megatron_cpt.planner.memory import GIB
from megatron_cpt.planner.plan import TIGHT, Plan
from megatron_cpt.planner.throughput import Shape, stage_seconds
from megatron_cpt.planner.timeline import timeline

ENDINGS = (".html", ".png")
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "transient", "overhead")
_COLOURS = ("#2f6fb3", "#6ba4dd", "#a9cbea", "#c26a3d", "#e0a37f", "#f0cdb8", "#9aa6b3")
_FORWARD, _BACKWARD = "#6ba4dd", "#c26a3d"


@dataclass(frozen=True)
class Course:
    """What the run does over its tokens: the learning rate at each of `tokens`, and the samples of a step there."""

    tokens: Sequence[int]
    rates: Sequence[float]
    batch_sizes: Sequence[int]
    first_shares: dict[str, float]  # of each source, where the run stands
    last_shares: dict[str, float]  # at its end


def write_picture(plan: Plan, course: Course, page: str, path: Path) -> None:
    """Write one self-contained page, or one PNG, as the ending of `path` says. `page` is the plan as text.

    Raises:
        ConfigError: another ending; matplotlib is not installed.
        UserError: the file cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(
            f"{path}: a picture is a file that ends in {' or '.join(ENDINGS)}", hint="--picture plan.html"
        )
    figure = _figure(plan, course)
    if path.suffix == ".png":
        content = _saved(figure, format="png", dpi=110)
    else:
        svg = _saved(figure, format="svg").decode()
        content = _html(plan, page, svg[svg.index("<svg") :]).encode()
    write_output(path, content, hint="name a file in a folder that can be written")


def _figure(plan: Plan, course: Course) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "pictures are drawn with matplotlib, which is not installed", hint="pip install 'megatron-cpt[plots]'"
        ) from error
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "megatron-cpt"  # the same plan is the same file
    height = 2.4 + 0.28 * len(plan.stages)
    figure = Figure(figsize=(11, 3 + 2 * height), layout="constrained")
    memory, step, run = figure.subplots(3, 1, height_ratios=[height, height, 3])
    _draw_memory(memory, plan)
    _draw_step(step, plan)
    _draw_course(run, course)
    return figure


def _saved(figure: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Date": None} if how["format"] == "svg" else None, **how)
    return buffer.getvalue()


def _draw_memory(axes: Any, plan: Plan) -> None:
    names = [f"stage {stage.stage}" for stage in plan.stages]
    left = [0.0] * len(names)
    for part, colour in zip(_PARTS, _COLOURS, strict=True):
        widths = [getattr(stage, part) / GIB for stage in plan.stages]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    capacity = plan.hardware.memory_bytes / GIB
    axes.axvline(capacity, color="#1d232b", linewidth=1.5)
    axes.axvline(TIGHT * capacity, color="#1d232b", linewidth=1, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(capacity, *left))
    axes.set_xlabel("GiB on a GPU")
    axes.set_title(
        f"Memory: {plan.verdict}; {plan.hardware.name} has {capacity:.1f} GiB, the dotted line is what is safe",
        loc="left",
    )
    axes.legend(
        ncols=len(_PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.2 / (0.4 + 0.1 * len(names))), frameon=False
    )


def _draw_step(axes: Any, plan: Plan) -> None:
    layout = plan.layout
    rounds = min(layout.micro_batches, 2 * layout.pp + (4 if layout.chunks == 1 else 0))
    rounds -= rounds % layout.pp if layout.chunks > 1 else 0
    spans = timeline(stage_seconds(Shape.of(plan.survey.arch), layout, plan.hardware), rounds, layout.chunks)
    for stage in range(layout.pp):
        for forward, colour in ((True, _FORWARD), (False, _BACKWARD)):
            bars = [(s.start, s.end - s.start) for s in spans if s.stage == stage and s.forward == forward]
            axes.broken_barh(bars, (stage - 0.38, 0.76), facecolors=colour, edgecolor="white", linewidth=0.4)
    axes.set_yticks(range(layout.pp), [f"stage {stage}" for stage in range(layout.pp)])
    axes.invert_yaxis()
    axes.set_xlim(0, max(span.end for span in spans))
    axes.set_xlabel("seconds; blue is forward, orange backward, white is waiting")
    kind = "1F1B" if layout.chunks == 1 else f"interleaved, {layout.chunks} chunks a stage"
    of_all = "" if rounds == layout.micro_batches else f" of {layout.micro_batches}"
    axes.set_title(f"One step of the pipeline ({kind}): {rounds}{of_all} micro-batches", loc="left")


def _draw_course(axes: Any, course: Course) -> None:
    billions = [tokens / 1e9 for tokens in course.tokens]
    axes.plot(billions, course.rates, color=_FORWARD, linewidth=2)
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.08 * max(course.rates))
    axes.set_xlim(billions[0], billions[-1])
    axes.set_xlabel("billion tokens")
    right = axes.twinx()
    right.step(billions, course.batch_sizes, color=_BACKWARD, linewidth=1.5, where="post")
    right.set_ylabel("samples a step")
    right.set_ylim(0, 1.3 * max(course.batch_sizes))
    shares = ", ".join(
        f"{name} {share:.0%}" + (f" to {last:.0%}" if (last := course.last_shares[name]) != share else "")
        for name, share in course.first_shares.items()
    )
    axes.set_title(
        "Over the run: learning rate (blue), batch (orange)" + (f"; blend: {shares}" if shares else ""), loc="left"
    )


def _html(plan: Plan, page: str, svg: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("plan.html.jinja").render(title=plan.survey.config.job_name, page=page, svg=svg)
