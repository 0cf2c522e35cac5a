"""`megatron-cpt plan`: everything that can be known of a run before it starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from megatron_cpt.config.load import load_config
from megatron_cpt.config.phases import draw_rates, phase_at, sample_rates
from megatron_cpt.launch.survey import raise_findings, survey
from megatron_cpt.planner.hardware import DEFAULT, find_hardware, known_hardware
from megatron_cpt.planner.page import plan_page, search_page
from megatron_cpt.planner.pictures import Course, write_picture
from megatron_cpt.planner.plan import Plan, blocking_findings, make_plan, plan_json
from megatron_cpt.planner.search import search, search_json


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--hardware",
    metavar="NAME",
    default=DEFAULT,
    show_default=True,
    help=f"GPUs to plan for: {', '.join(known_hardware())}.",
)
@click.option(
    "--price-per-gpu-hour", type=click.FloatRange(min=0.0), help="Print the cost of the run at this price of a GPU."
)
@click.option("--search", "searches", is_flag=True, help="List the fastest layouts that fit, with overrides to paste.")
@click.option("--gpus", type=click.IntRange(min=1), help="With --search: GPUs to use instead of the config's number.")
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw memory, one step and the course of the run: FILE.html, which holds the page too, or FILE.png.",
)
@click.option("--strict", is_flag=True, help="What is missing on this machine, or does not fit, is an error.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def plan(
    config_path: Path,
    overrides: tuple[str, ...],
    hardware: str,
    price_per_gpu_hour: float | None,
    searches: bool,
    gpus: int | None,
    picture: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Check CONFIG as `train` would, and print what the run will need: memory, time, disk, data and cost.

    Nothing is started or written, and no GPU is needed. All that is wrong is listed at once, each with a legal value.
    What is only missing on this machine, a dataset or the weights, is a note; with --strict it is an error, for the
    machine that will train.

    \b
    Try a change without editing the file:
      megatron-cpt plan examples/qwen2_72b/config.yaml budget.train_tokens=3B parallel.pp=8 --hardware a800-80g
      megatron-cpt plan examples/qwen2_72b/config.yaml --search --gpus 64
    """
    if gpus is not None and not searches:
        raise click.UsageError(
            "--gpus belongs to --search; the GPUs of the plan are parallel.nodes x parallel.gpus_per_node"
        )
    gpu = find_hardware(hardware)
    config = load_config(config_path, overrides)
    made = make_plan(survey(config, str(config_path)), gpu, price_per_gpu_hour)
    raise_findings(blocking_findings(made, strict=strict and not searches), str(config_path))
    found = search(config, made.survey.arch, gpu, gpus) if searches else None
    page = plan_page(made, draw_rates(made.survey.config, made.survey.ledger.tokens))
    if picture is not None:
        write_picture(made, _course(made), page, picture)
    if as_json:
        click.echo(json.dumps(_contract(made) | ({} if found is None else search_json(found, config, gpu)), indent=1))
    else:
        click.echo(page if found is None else search_page(found, made))
        if picture is not None:
            click.echo(f"wrote {picture}")


def _rates(plan: Plan, points: int) -> list[tuple[int, float]]:
    return sample_rates(plan.survey.config, plan.survey.ledger.tokens, points)


def _course(plan: Plan) -> Course:
    config, samples, sources = plan.survey.config, _rates(plan, 401), plan.survey.sources
    return Course(
        [tokens for tokens, _ in samples],
        [rate for _, rate in samples],
        [phase_at(config, tokens).batch_size.at(tokens) for tokens, _ in samples],
        {source.name: source.first_share for source in sources},
        {source.name: source.last_share for source in sources},
    )


def _contract(plan: Plan) -> dict[str, Any]:
    """The plan under the names of the config contract."""
    config, derived = plan.survey.config, plan.survey.derived
    return {
        "job_name": config.job_name,
        "run_dir": config.folder,
        **{key: value for key, value in dataclasses.asdict(derived).items() if key != "notes"},
        "architecture": dataclasses.asdict(plan.survey.arch),
        "learning_rates": [{"consumed_tokens": tokens, "lr": lr} for tokens, lr in _rates(plan, 21)],
        **plan_json(plan),
        "config": config.model_dump(mode="json"),
    }
