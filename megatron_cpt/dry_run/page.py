"""The result of a dry run as one page of text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_cpt.dry_run.every_rank import Check, DryRun, Stage
from megatron_cpt.dry_run.live_bytes import PARTS
from megatron_cpt.launch.survey import Survey
from megatron_cpt.planner.memory import GIB
from megatron_cpt.planner.text import told_apart, wrapped

_MOST_FAULTS = 20
_STATIC = ("weights", "gradients", "optimizer", "reference", "penalty")
_RARE = ("reference", "penalty")  # shown where there is any
NOT_COUNTED = "a GPU also holds the CUDA context, NCCL's buffers and the allocator's gaps: megatron-cpt plan adds them"


def notes(survey: Survey) -> list[str]:
    """Return what a reader of the result should know that it does not show."""
    config = survey.config
    found = [f"not on this machine: {finding.message}" for finding in survey.findings if finding.only_here]
    if config.precision.fp8 is not None:
        found.append("activations are counted in bf16: what TransformerEngine keeps of them in fp8 is not known here")
    if config.model.attention == "auto":
        found.append("attention is counted as TransformerEngine's, which model.attention: auto takes where it is there")
    return [*found, NOT_COUNTED]


def dry_run_page(result: DryRun, survey: Survey, files: Sequence[str]) -> str:
    """Return the page. `files` are the lines of `read_headers`."""
    lines = [
        f"dry run of {survey.config.job_name}: each of the {result.ranks:,} ranks was built",
        *_checks(result, survey),
        *(f"  {line}" for line in files),
        *_bytes(result),
        *(line for note in notes(survey) for line in wrapped(f"note: {note}")),
        *(line for fault in result.faults[:_MOST_FAULTS] for line in wrapped(f"fault: {fault.message}")),
    ]
    if len(result.faults) > _MOST_FAULTS:
        lines.append(f"and {len(result.faults) - _MOST_FAULTS:,} more faults")
    if result.ok:
        lines.append("everything fits together")
    return "\n".join(lines)


def dry_run_json(result: DryRun, survey: Survey, files: Sequence[str]) -> dict[str, Any]:
    """Return the result under stable names; sizes in bytes."""
    return {
        "job_name": survey.config.job_name,
        "ok": result.ok,
        "parameters": result.parameters,
        "expected_parameters": survey.arch.num_parameters,
        "ranks": result.ranks,
        "max_rank_bytes": result.max_rank_bytes,
        "checkpoint": {"tensors": result.tensors, "shards": result.shards},
        "micro_batches": result.micro_batches,
        "messages": result.messages,
        "stages": [_stage_json(stage) for stage in result.stages],
        "files": list(files),
        "notes": notes(survey),
        "faults": [fault._asdict() for fault in result.faults],
    }


def _stage_json(stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "ranks": stage.ranks,
        "layers": stage.layers,
        **{f"{part}_bytes": getattr(stage.static, part) for part in _STATIC},
        **{f"{part}_bytes": stage.step.at_peak[part] for part in PARTS},
        "total_bytes": stage.peak,
        "host_bytes": stage.static.host,
    }


def _checks(result: DryRun, survey: Survey) -> Iterator[str]:
    expected, steps = survey.arch.num_parameters, survey.derived.gradient_accumulation_steps
    same = "as" if result.parameters == expected else f"not the {expected:,} that"
    yield _row("layout", survey.config.parallel.describe())
    yield _row(
        "parameters", f"{result.parameters:,} over all ranks, {same} config.json says{_found(result, 'parameters')}"
    )
    yield _row(
        "checkpoint",
        f"{result.tensors:,} tensors of weights and optimizer in {result.shards:,} shards"
        + _found(result, "checkpoint", "each element is written once"),
    )
    yield _row(
        "one step",
        f"{result.micro_batches:,} of {steps:,} micro-batches, forward and backward, on a rank of each stage",
    )
    if len(result.stages) > 1:
        yield _row(
            "pipeline",
            f"{result.messages:,} tensors sent in it" + _found(result, "pipeline", "each is what its receiver expects"),
        )


def _found(result: DryRun, check: Check, otherwise: str = "") -> str:
    """The end of a line: what a check found, or what holds when it found nothing."""
    count = result.faults_of(check)
    says = otherwise if count == 0 else f"{count:,} fault{'s' if count > 1 else ''}, listed below"
    return f": {says}" if says else ""


def _bytes(result: DryRun) -> Iterator[str]:
    stages = [stage.static for stage in result.stages]
    static = [part for part in _STATIC if part not in _RARE or any(getattr(stage, part) for stage in stages)]
    columns = (*static, *PARTS, "peak")
    yield "GiB of a rank when it holds most"
    yield "  stage  layers " + " ".join(f"{column:>11}" for column in columns)
    for stage in told_apart(result.stages, lambda stage: stage.peak, fullest=6):
        sizes = [getattr(stage.static, part) for part in static]
        sizes += [stage.step.at_peak[part] for part in PARTS]
        cells = " ".join(f"{size / GIB:>11.2f}" for size in (*sizes, stage.peak))
        yield f"  {stage.stage:>5}  {stage.layers:>6} {cells}"
    host = max(stage.static.host for stage in result.stages)
    if host:
        yield _row("host memory", f"{host / GIB:.2f} GiB of optimizer state for each rank, at most")


def _row(label: str, text: str) -> str:
    return f"  {label:<12}{text}"
