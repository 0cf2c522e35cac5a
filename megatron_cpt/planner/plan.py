"""One plan: what a run will need and cost, put together from memory, throughput, disk and advice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cpt.launch.survey import Finding, Survey
from megatron_cpt.planner.advice import Advice, advise, surprises
from megatron_cpt.planner.disk import DiskNeed, disk_need
from megatron_cpt.planner.hardware import Hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import GIB, StageMemory, memory_of_stages, worst_stage
from megatron_cpt.planner.throughput import UNCERTAINTY, Shape, Throughput, throughput

Verdict = Literal["fits", "tight", "does not fit"]
# A rank that is predicted to hold more than this share of its GPU may run out of memory: the prediction's own error.
TIGHT = 0.92


@dataclass(frozen=True)
class Cost:
    """Time and money of what is left of the budget. The bounds are those of the planner's own error."""

    hours: float
    hours_low: float
    hours_high: float
    gpu_hours: float
    validation_hours: float | None  # of `hours`; None where the size of a set is not known here
    price: float | None  # at the given price per GPU-hour


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it starts."""

    survey: Survey
    hardware: Hardware
    layout: Layout
    stages: tuple[StageMemory, ...]
    speed: Throughput
    cost: Cost
    disk: DiskNeed
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def worst(self) -> StageMemory:
        return worst_stage(self.stages)

    @property
    def verdict(self) -> Verdict:
        return verdict(self.worst, self.hardware)


def verdict(worst: StageMemory, hardware: Hardware) -> Verdict:
    """Say whether the fullest rank fits into its GPU."""
    if worst.total > hardware.memory_bytes:
        return "does not fit"
    return "fits" if worst.total <= TIGHT * hardware.memory_bytes else "tight"


def make_plan(survey: Survey, hardware: Hardware, price_per_gpu_hour: float | None = None) -> Plan:
    """Predict what the run of `survey` needs on `hardware`."""
    config, arch, derived = survey.config, survey.arch, survey.derived
    layout = Layout.of(config, arch)
    speed = throughput(Shape.of(arch), layout, hardware)
    disk = disk_need(config, arch, derived)
    cost = _cost(survey, speed, layout.gpus, price_per_gpu_hour)
    notes = [*surprises(config, derived), *_slow_saves(disk, cost)]
    return Plan(
        survey, hardware, layout, memory_of_stages(arch, layout), speed, cost, disk, tuple(advise(survey)), tuple(notes)
    )


def blocking_findings(plan: Plan, *, strict: bool) -> list[Finding]:
    """Return what stops the run: what is wrong anywhere, and with `strict` what is missing here or does not fit."""
    found = plan.survey.blocking(strict=strict)
    if strict and plan.verdict == "does not fit":
        need, there = plan.worst.total / GIB, plan.hardware.memory_bytes / GIB
        found.append(
            Finding(
                f"stage {plan.worst.stage} needs {need:.1f} GiB on a GPU, {plan.hardware.name} has {there:.1f}",
                "megatron-cpt plan CONFIG --search shows layouts that fit; --hardware states another GPU",
                only_here=False,
            )
        )
    return found


def plan_json(plan: Plan) -> dict[str, Any]:
    """The predictions under stable names; sizes in bytes, times in hours or seconds."""
    return {
        "hardware": {"name": plan.hardware.name, "memory_bytes": plan.hardware.memory_bytes},
        "memory": [
            dataclasses.asdict(stage) | {"static": stage.static, "live": stage.live, "total": stage.total}
            for stage in plan.stages
        ],
        "verdict": plan.verdict,
        "headroom_bytes": plan.hardware.memory_bytes - plan.worst.total,
        "throughput": {
            "tokens_per_s": plan.speed.tokens_per_s,
            "tokens_per_s_per_gpu": plan.speed.tokens_per_s_per_gpu,
            "mfu": plan.speed.mfu,
            "step_seconds": plan.speed.step.total,
            "step_seconds_by_part": dataclasses.asdict(plan.speed.step),
            "uncertainty": UNCERTAINTY,
        },
        "cost": dataclasses.asdict(plan.cost),
        "disk": dataclasses.asdict(plan.disk) | {"peak_bytes": plan.disk.peak_bytes},
        "sources": [dataclasses.asdict(source) for source in plan.survey.sources],
        "advice": [dataclasses.asdict(advice) for advice in plan.advice],
        "missing_here": [finding.message for finding in plan.survey.findings if finding.only_here],
        "notes": list(plan.notes),
    }


def _cost(survey: Survey, speed: Throughput, gpus: int, price_per_gpu_hour: float | None) -> Cost:
    left = max(0, survey.derived.train_tokens - survey.ledger.tokens)
    training = left / speed.tokens_per_s / 3600
    validation = _validation_hours(survey, speed)
    hours = training + (validation or 0.0)
    gpu_hours = hours * gpus
    price = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    return Cost(hours, hours / (1 + UNCERTAINTY), hours * (1 + UNCERTAINTY), gpu_hours, validation, price)


def _validation_hours(survey: Survey, speed: Throughput) -> float | None:
    """Hours of all validations; a token that is only read costs a third of one that is trained."""
    read = list(survey.validation_tokens.values())
    if any(tokens is None for tokens in read):
        return None
    derived, every = survey.derived, survey.config.eval.every
    times = 2 + (0 if every is None else derived.train_tokens // every.in_tokens(derived.tokens_per_step))
    return sum(tokens or 0 for tokens in read) * times / 3 / speed.tokens_per_s / 3600


def _slow_saves(disk: DiskNeed, cost: Cost) -> list[str]:
    between = cost.hours / disk.saves
    if between <= 2:
        return []
    return [f"checkpoint.save_every: a save every {between:.1f} hours is what a failure costs at most"]
