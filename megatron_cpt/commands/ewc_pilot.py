"""`megatron-cpt ewc-pilot`: the strength of forgetting.ewc, by short runs on the user's own data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from megatron_cpt.commands.kinds_of_text import domain_option, general_option, sets_by_kind
from megatron_cpt.config.load import load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.forgetting.trade_off import Choice, Outcome, choose, log_scale, next_to_try

_FISHER_RANGE = (1.0, 1e4)  # with F per token the penalty at 1 is about the divergence per token from the base
_ONES_RANGE = (1e-4, 1.0)


@click.command("ewc-pilot")
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of each short run.  [default: 5 % of the budget]")
@click.option("--from", "low", type=click.FloatRange(min=0, min_open=True), help="Least strength.  [default: 1]")
@click.option("--to", "high", type=click.FloatRange(min=0, min_open=True), help="Largest.  [default: 10,000]")
@click.option("--points", type=click.IntRange(1, 20), default=5, show_default=True, help="How many, at equal ratios.")
@click.option(
    "--refine",
    type=click.IntRange(0, 10),
    default=2,
    show_default=True,
    help="Further runs, each half-way between the largest strength that keeps enough and the next one.",
)
@click.option("--keep", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Least share of the gain.")
@domain_option
@general_option
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the runs.  [default: RUN.ewc-pilot]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def ewc_pilot(
    config_path: Path,
    overrides: tuple[str, ...],
    tokens: int | None,
    low: float | None,
    high: float | None,
    points: int,
    refine: int,
    keep: float,
    domain: tuple[str, ...],
    general: tuple[str, ...],
    folder: Path | None,
    as_json: bool,
) -> None:
    """Try strengths of forgetting.ewc on a log scale in short runs of CONFIG, and propose one.

    \b
      megatron-cpt ewc-pilot config.yaml --general facts --domain medical --tokens 2000000
    One run goes without the penalty. Of the strengths that keep --keep of its gain on the domain the one with the least
    rise of general loss is proposed; you decide. A short run moves the weights less than a long one, so take the
    proposal as the least strength to try. Started again, the command goes on where it was; each run's checkpoint is
    deleted when it is measured. With fisher: ones the range is 0.0001 to 1.
    """
    from megatron_cpt.train.pilot import run_trials

    config = load_config(config_path, overrides)
    if config.forgetting.ewc is None:
        raise ConfigError(
            "forgetting.ewc is missing: the pilot varies its strength",
            hint="megatron-cpt fisher, then forgetting.ewc.fisher=DIR forgetting.ewc.strength=1; or fisher: ones",
        )
    strengths = _strengths(config, low, high, points)
    domain_sets, general_sets = sets_by_kind(config, domain, general)
    folder = folder or Path(f"{config.folder}.ewc-pilot")
    tokens = tokens or max(1, config.budget.train_tokens // 20)

    def outcomes_of(tried: Sequence[float]) -> list[Outcome]:
        trials = {f"strength_{strength:g}": {"forgetting.ewc.strength": strength} for strength in tried}
        return [
            Outcome.of(strength, trial.first, trial.last, domain_sets, general_sets)
            for strength, trial in zip(tried, run_trials(config, trials, tokens, folder), strict=True)
        ]

    tried = [0.0, *strengths]
    outcomes = outcomes_of(tried)
    for _ in range(refine):
        if (further := next_to_try(outcomes, keep)) is None or further in tried:
            break
        tried.append(further)
        outcomes = outcomes_of(tried)
    choice = choose(outcomes, keep)
    if as_json:
        click.echo(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes], **asdict(choice)}))
    else:
        click.echo(_page(outcomes, choice))


def _strengths(config: RunConfig, low: float | None, high: float | None, points: int) -> list[float]:
    assert config.forgetting.ewc is not None
    least, most = _ONES_RANGE if config.forgetting.ewc.folder is None else _FISHER_RANGE
    low, high = low or min(least, high or least), high or max(most, low or most)
    if low > high:
        raise click.BadParameter(f"--from {low:g} is above --to {high:g}")
    return list(dict.fromkeys(log_scale(low, high, points)))


def _page(outcomes: Sequence[Outcome], choice: Choice) -> str:
    plain = outcomes[0]
    lines = [f"{'strength':>10} {'domain gain':>12} {'kept':>6} {'general rise':>13} {'spared':>7}   (nats per token)"]
    for outcome in sorted(outcomes, key=lambda outcome: outcome.strength):
        kept = f"{round(100 * outcome.kept(plain))}%" if plain.domain_gain > 0 else "-"
        spared = f"{round(100 * outcome.spared(plain))}%" if plain.general_rise > 0 else "-"
        lines.append(
            f"{outcome.strength:>10g} {outcome.domain_gain:>12.4f} {kept:>6} {outcome.general_rise:>13.4f} {spared:>7}"
        )
    proposal = "no proposal" if choice.strength is None else f"proposal: forgetting.ewc.strength={choice.strength:g}"
    return "\n".join([*lines, f"{proposal}: {choice.why}"])
