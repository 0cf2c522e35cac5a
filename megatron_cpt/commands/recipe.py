"""`megatron-cpt recipe`: what the evidence, and short runs on the user's own data, propose for a config."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_cpt.commands.kinds_of_text import domain_option, general_option, sets_by_kind
from megatron_cpt.config.load import load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.forgetting.mix_law import MixLaw, fit, least_share
from megatron_cpt.forgetting.trade_off import Outcome
from megatron_cpt.launch.survey import raise_findings, survey
from megatron_cpt.planner.recipe import Proposal, Shift, propose, shift_of

if TYPE_CHECKING:
    from megatron_cpt.train.pilot import Trial

logger = logging.getLogger(__name__)

_SHARES = (0.0, 0.05, 0.25)  # of replay
_RATES = (1.0, 0.5, 2.0)  # times the config's
_LIMIT = 0.03  # rise of general perplexity, where there is no gate


@dataclass(frozen=True)
class Measured:
    """What the pilot found: a row per run, the two laws, and what follows."""

    rows: tuple[dict[str, float], ...]
    domain_law: MixLaw
    general_law: MixLaw
    max_rise: float  # nats per token
    replay_ratio: float
    lr: float
    why: str


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--shift", type=click.Choice(["weak", "strong"]), help="Of the domain.  [default: measured]")
@click.option(
    "--measure-tokens",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    help="Of each set, for the shift.",
)
@domain_option
@general_option
@click.option("--pilot", is_flag=True, help="Measure replay share and rate in five short runs.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of each short run.  [default: 5 % of the budget]")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder of the runs.  [default: RUN.recipe]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def recipe(
    config_path: Path,
    overrides: tuple[str, ...],
    shift: Shift | None,
    measure_tokens: int,
    domain: tuple[str, ...],
    general: tuple[str, ...],
    pilot: bool,
    tokens: int | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Propose rate, warm-up, schedule, replay, epochs, gate and KL for CONFIG: it proposes, you decide.

    \b
      megatron-cpt recipe config.yaml --domain medical --general facts
      megatron-cpt recipe config.yaml --general facts --pilot --tokens 2000000
    Each proposal comes with its evidence and grade (P: the paper was read, S: a secondary note, M: measured by this
    project, I: inference) and with what contradicts it. The shift is measured: the base model's bits per byte on the
    domain against those on general text. With --pilot three shares of replay and then two more rates are tried on
    your data, and the losses are fitted in the form of the D-CPT law; started again, it goes on where it was.
    """
    config = load_config(config_path, overrides)
    found = survey(config, str(config_path))
    raise_findings([finding for finding in found.findings if not finding.only_here], str(config_path))
    bits: dict[str, float] = {}
    if shift is None or pilot:
        domain_sets, general_sets = sets_by_kind(config, domain, general)
    if shift is None:
        bits = _bits_per_byte(config, [*domain_sets, *general_sets], measure_tokens)
        shift = shift_of(_mean(bits, domain_sets), _mean(bits, general_sets))
    proposals = propose(found, shift)
    measured = None
    if pilot:
        measured = _pilot(config, domain_sets, general_sets, tokens, folder or Path(f"{config.folder}.recipe"))
    if as_json:
        told: dict[str, Any] = {"shift": shift, "bits_per_byte": bits, "proposals": [asdict(one) for one in proposals]}
        click.echo(json.dumps(told | {"pilot": None if measured is None else asdict(measured)}))
        return
    click.echo("\n".join([*_head(shift, bits), *_page(proposals), *(_measured_page(measured) if measured else [])]))


def _mean(losses: Mapping[str, float], names: Sequence[str]) -> float:
    return math.fsum(losses[name] for name in names) / len(names)


def _bits_per_byte(config: RunConfig, names: Sequence[str], max_tokens: int) -> dict[str, float]:
    """Of the base model on each validation set.

    Raises:
        ConfigError: there is no base model to measure, or a set's text is not known.
        CheckpointError: the base model cannot be opened.
    """
    if config.model.init_from == "random":
        raise ConfigError("a model from scratch knows nothing yet: there is no shift", hint="--shift strong")
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval.model import load_scorer
    from megatron_cpt.eval.perplexity import perplexity, predicted_ranges
    from megatron_cpt.eval.token_stream import open_token_stream, text_bytes

    base = open_checkpoint(Path(config.model.init_from))
    seq_length = min(config.batch.seq_length, base.arch.positions)
    logger.info("measuring the shift: %s on %s; --shift weak or strong does without", base.path, ", ".join(names))
    scorer = load_scorer(base, seq_length)
    bits = {}
    for name in names:
        stream = open_token_stream(str(config.data.validation[name]), base.side_dir, base.arch.vocab_size, "text")
        result = perplexity(scorer, stream, seq_length, max_tokens, lambda *done: None)
        size = text_bytes(stream, predicted_ranges(stream, max_tokens, per_document=False), base.side_dir)
        value = None if size is None else result.bits_per_byte(size)
        if value is None:
            raise ConfigError(f"the bytes of {name} are not known without its tokenizer", hint="--shift weak or strong")
        bits[name] = value
    return bits


def _pilot(
    config: RunConfig, domain: Sequence[str], general: Sequence[str], tokens: int | None, folder: Path
) -> Measured:
    """Three shares of replay, then two more rates at the share that follows.

    Raises:
        ConfigError: nothing to replay.
        PilotStopped: somebody asked for it; the same command goes on.
    """
    if not any(source.role == "replay" for source in config.data.train):
        raise ConfigError(
            "the pilot varies the share of replay, and no source of data.train has the role replay",
            hint="add general text: data.train: [..., {name: general, prefix: ..., role: replay}]",
        )
    from megatron_cpt.train.pilot import run_trials

    tokens = tokens or max(1, config.budget.train_tokens // 20)
    rate = config.optimizer.lr
    trials = {_name(share, rate): _changes(config, share, 1.0) for share in _SHARES}
    first = run_trials(config, trials, tokens, folder)
    rows = [_row(share, rate, trial, domain, general) for share, trial in zip(_SHARES, first, strict=True)]
    domain_law = fit([(1 - row["replay_ratio"], row["domain_loss"]) for row in rows])
    general_law = fit([(row["replay_ratio"], row["general_loss"]) for row in rows])
    gate = config.forgetting.gate
    max_rise = math.log1p(_LIMIT if gate is None else gate.max_general_perplexity_increase)
    share = least_share(general_law, rows[0]["general_loss"] - rows[0]["general_rise"], max_rise)
    chosen = _SHARES[-1] if share is None else share
    trials |= {_name(chosen, times * rate): _changes(config, chosen, times) for times in _RATES}
    tried = dict(zip(trials, run_trials(config, trials, tokens, folder), strict=True))
    at_share = [_row(chosen, times * rate, tried[_name(chosen, times * rate)], domain, general) for times in _RATES]
    allowed = [row for row in at_share if row["general_rise"] <= max_rise]
    best = (
        max(allowed, key=lambda row: row["domain_gain"])
        if allowed
        else min(at_share, key=lambda row: row["general_rise"])
    )
    known = {(row["replay_ratio"], row["lr"]): row for row in [*rows, *at_share]}
    return Measured(
        tuple(known.values()),
        domain_law,
        general_law,
        max_rise,
        chosen,
        best["lr"],
        _why(share, bool(allowed), max_rise),
    )


def _name(share: float, rate: float) -> str:
    return f"replay_{share:g}_lr_{rate:g}"


def _changes(config: RunConfig, share: float, times: float) -> dict[str, Any]:
    return {
        "data.replay_ratio": share,
        "data.schedule": "null",
        "optimizer.lr": times * config.optimizer.lr,
        "optimizer.min_lr": times * config.optimizer.min_lr,
    }


def _row(share: float, rate: float, trial: Trial, domain: Sequence[str], general: Sequence[str]) -> dict[str, float]:
    outcome = Outcome.of(share, trial.first, trial.last, domain, general)
    return {
        "replay_ratio": share,
        "lr": rate,
        "domain_gain": outcome.domain_gain,
        "general_rise": outcome.general_rise,
        "domain_loss": _mean(trial.last, domain),
        "general_loss": _mean(trial.last, general),
    }


def _why(share: float | None, within: bool, max_rise: float) -> str:
    limit = f"a rise of general loss of {max_rise:.3f} nats per token"
    found = f"the least share that keeps {limit}" if share is not None else f"no share up to 50 % keeps {limit}"
    return found + ("; of the rates within it the one that learns most" if within else "; the rate with the least rise")


def _head(shift: str, bits: Mapping[str, float]) -> list[str]:
    said = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    return [
        f"shift: {shift}"
        + (f" (the base model's bits per byte: {said}; the threshold is an inference)" if said else "")
    ]


def _page(proposals: Sequence[Proposal]) -> list[str]:
    lines = []
    for one in proposals:
        lines.append(
            f"\n{one.key}: {one.current} now" + (f", {one.value} proposed" if one.value else ", to be measured")
        )
        lines.append(f"  {one.why}")
        lines.append(f"  evidence: {one.evidence}")
        if one.conflict:
            lines.append(f"  but: {one.conflict}")
        if one.requires:
            lines.append(f"  needs first: {one.requires}")
    changed = [one for one in proposals if one.value and one.value != one.current and not one.requires]
    words = " ".join(f"'{one.key}={one.value}'" for one in changed)
    return [*lines, "", "as overrides, those you agree with:", f"  {words}"] if words else lines


def _measured_page(measured: Measured) -> list[str]:
    lines = ["", f"{'replay':>7} {'rate':>9} {'domain gain':>12} {'general rise':>13}   (nats per token, short runs)"]
    lines += [
        f"{row['replay_ratio']:>7.1%} {row['lr']:>9.3g} {row['domain_gain']:>12.4f} {row['general_rise']:>13.4f}"
        for row in measured.rows
    ]
    law = measured.general_law
    lines.append(
        f"general loss = {law.floor:.3f} + {law.scale:.3g} / (share + 0.01)^{law.gamma:.2f}: the form of the D-CPT law "
        "(arXiv:2406.01375), through three points"
    )
    lines.append(
        f"measured proposal: data.replay_ratio={measured.replay_ratio:g} optimizer.lr={measured.lr:g}: {measured.why}"
    )
    return lines
