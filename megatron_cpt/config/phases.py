"""A run as a function of the tokens consumed: which phase it is in, what that trains with, what is wrong with phases.

A run without `phases` is one phase. The end of a phase is the sum of the budgets up to it; the step that passes it is
its last one, and the next phase begins after that step, so that only the end of the run is rounded up to a whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_cpt.config.learning_rate import learning_rate
from megatron_cpt.config.mix import MixPiece, beginning_at
from megatron_cpt.config.phase import Phase
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.data import Curriculum, CurriculumPoint
from megatron_cpt.config.sections.phase import PhaseConfig, PhaseData
from megatron_cpt.config.sections.schedule import ScheduleConfig


def phase_at(config: RunConfig, consumed_tokens: int = 0) -> Phase:
    """Return what the step after `consumed_tokens` trains with. A pure function: nothing is kept between steps."""
    run_end = config.steps(consumed_tokens).train_tokens
    if not config.phases:
        return Phase(
            name="",
            end_tokens=run_end,
            rate_end_tokens=run_end,
            warmup_tokens=config.budget.warmup_tokens,
            seq_length=config.batch.seq_length,
            batch_size=config.batch.size,
            schedule=config.schedule,
            optimizer=config.optimizer,
            mix=config.data.mix(),
        )
    passed = [end for end in config.phase_ends if end <= consumed_tokens]
    return _phase(config, min(len(passed), len(config.phases) - 1), run_end)


def _phase(config: RunConfig, index: int, run_end: int) -> Phase:
    asked, ends = config.phases[index], config.phase_ends
    batch = config.phase_batch(asked)
    start, last = (ends[index - 1] if index else 0), index == len(ends) - 1
    plain = Phase(
        name=asked.name,
        end_tokens=run_end if last else ends[index],
        rate_end_tokens=run_end,
        warmup_tokens=config.budget.warmup_tokens,
        seq_length=batch.seq_length,
        batch_size=batch.size,
        schedule=config.schedule,
        optimizer=config.optimizer,
        mix=mix_of_phase(config, asked.data, start),
        stops=asked.then == "stop" and not last,
    )
    if asked.rate.course == "continue":
        return plain
    rate = asked.rate
    before = learning_rate(_phase(config, index - 1, run_end), start) if index else config.schedule.warmup_from_lr
    anneals = rate.course == "anneal"
    peak = before if anneals else rate.lr or config.optimizer.lr
    floor = config.optimizer.min_lr if rate.min_lr is None else rate.min_lr
    return replace(
        plain,
        rate_end_tokens=plain.end_tokens,
        warmup_tokens=0 if anneals else rate.warmup_tokens,
        # A schedule of this phase alone: what the run's own says of decays and cool-downs does not hold in it.
        schedule=ScheduleConfig(kind=rate.shape, start_tokens=start, warmup_from_lr=min(before, peak)),
        optimizer=config.optimizer.model_copy(update={"lr": peak, "min_lr": min(floor, peak)}),
    )


def mix_of_phase(config: RunConfig, asked: PhaseData, start_tokens: int) -> tuple[MixPiece, ...]:
    """Return the shares of a phase: its own, or those of the run, which count from the beginning of the run."""
    schedule = asked.schedule
    if asked.shares is not None:
        schedule = Curriculum(points=(CurriculumPoint(tokens=0, shares=asked.shares),))
    if asked.replay_ratio is None and schedule is None:
        return config.data.mix()
    return beginning_at(config.data.mix_of(asked.replay_ratio, schedule), start_tokens)


def sample_rates(config: RunConfig, consumed_tokens: int, points: int) -> list[tuple[int, float]]:
    """Return (consumed tokens, rate) at equal distances over the run, both ends included.

    `consumed_tokens`: where the run stands, on which the end of its last whole step depends.
    """
    end = config.steps(consumed_tokens).train_tokens
    positions = [end * i // (points - 1) for i in range(points)]
    return [(tokens, learning_rate(phase_at(config, min(tokens, end - 1)), tokens)) for tokens in positions]


def draw_rates(config: RunConfig, consumed_tokens: int, columns: int = 60) -> str:
    """Draw the rate over the run as one line of bars, as high as it is of the highest."""
    bars = " ▁▂▃▄▅▆▇█"
    rates = [rate for _, rate in sample_rates(config, consumed_tokens, columns)]
    return "".join(bars[round(rate / max(rates) * (len(bars) - 1))] for rate in rates)


def phase_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the phases, alone and together."""
    names = [phase.name for phase in config.phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("phases", None, f"two phases are named {name!r}", "give each phase its own name")
    for number, phase in enumerate(config.phases):
        yield from _one_phase_problems(config, f"phases.{number}", phase)
    if config.phases and all(phase.train_tokens for phase in config.phases):
        whole = config.phase_ends[-1]
        if config.budget.train_tokens != whole:
            rule = f"the phases add up to {whole:,}"
            yield Problem("budget.train_tokens", config.budget.train_tokens, rule, f"leave it out, or {whole:,}")


def _one_phase_problems(config: RunConfig, path: str, phase: PhaseConfig) -> Iterator[Problem]:
    if phase.train_tokens is not None and phase.epochs is not None:
        yield Problem(path, None, "has a budget in tokens and one in epochs", "leave out train_tokens or epochs")
    elif phase.train_tokens is None and phase.epochs is None:
        yield Problem(path, None, "has no budget", "train_tokens: 1B, or epochs: {source: NAME, count: 1}")
    elif phase.train_tokens is None:
        yield Problem(
            f"{path}.epochs",
            None,
            "is not known in tokens: the dataset is not here",
            "give train_tokens, or the dataset",
        )
    longest = config.batch.seq_length
    if phase.seq_length is not None and phase.seq_length > longest:
        rule = f"is more than batch.seq_length = {longest:,}, for which memory is planned"
        yield Problem(f"{path}.seq_length", phase.seq_length, rule, f"raise batch.seq_length to {phase.seq_length:,}")
    yield from _batch_problems(config, path, phase)
    data = phase.data
    if sum(asked is not None for asked in (data.replay_ratio, data.shares, data.schedule)) > 1:
        yield Problem(f"{path}.data", None, "says the blend in several ways", "keep one of its keys")
    else:
        yield from config.data.mix_problems(f"{path}.data", data.replay_ratio, data.schedule)
        if data.shares is not None:
            yield from config.data.share_problems(f"{path}.data.shares", data.shares)
    yield from _rate_problems(config, path, phase)


def _batch_problems(config: RunConfig, path: str, phase: PhaseConfig) -> Iterator[Problem]:
    """What divides a batch and a sequence must divide those of the phase too."""
    for problem in config.phase_batch(phase).problems(config.sections, None):
        key = problem.path.removeprefix("batch.")
        if key in phase.model_fields_set:  # else the run's own batch has the problem, and says so
            yield Problem(f"{path}.{key}", problem.value, problem.rule, problem.hint)


def _rate_problems(config: RunConfig, path: str, phase: PhaseConfig) -> Iterator[Problem]:
    rate = phase.rate
    stated = rate.model_fields_set - {"course"}
    needs: dict[str, set[str]] = {
        "continue": set(),
        "anneal": {"min_lr", "shape"},
        "rewarm": {"lr", "min_lr", "shape", "warmup_tokens"},
    }
    for key in sorted(stated - needs[rate.course]):
        if getattr(rate, key) != type(rate).model_fields[key].default:
            rule = f"means nothing to course {rate.course!r}"
            yield Problem(f"{path}.rate.{key}", getattr(rate, key), rule, "leave it out, or course: rewarm")
    if rate.course == "anneal" and rate.shape == "constant":
        yield Problem(f"{path}.rate.shape", "constant", "does not anneal", "cosine or linear")
    if rate.course == "rewarm":
        peak, floor = rate.lr or config.optimizer.lr, config.optimizer.min_lr if rate.min_lr is None else rate.min_lr
        if floor > peak:
            yield Problem(f"{path}.rate.min_lr", floor, f"is above the peak, {peak:g}", f"at most {peak:g}")
        if phase.train_tokens is not None and rate.warmup_tokens > phase.train_tokens:
            rule = f"exceeds the phase's {phase.train_tokens:,}"
            yield Problem(f"{path}.rate.warmup_tokens", rate.warmup_tokens, rule, "a fraction of the phase")
