"""A plan as one page of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_cpt.config.learning_rate import learning_rate
from megatron_cpt.config.mix import shares_at
from megatron_cpt.config.phases import phase_at
from megatron_cpt.launch.survey import SourceNeed
from megatron_cpt.planner.memory import GIB
from megatron_cpt.planner.plan import TIGHT, Plan
from megatron_cpt.planner.search import Found, why_not
from megatron_cpt.planner.text import told_apart, wrapped
from megatron_cpt.planner.throughput import UNCERTAINTY
from megatron_cpt.runs.checkpoints import format_bytes

_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "penalty",
    "activations",
    "logits",
    "transient",
    "overhead",
    "total",
)
_RARE = ("reference", "penalty")  # shown where there is any
_LABEL_COLUMNS = 18


def plan_page(plan: Plan, schedule: str) -> str:
    """Return the page. `schedule` is the drawn learning rate, one line."""
    return "\n".join([*_what(plan, schedule), *_memory(plan), *_speed(plan), *_disk(plan), *_data(plan), *_ends(plan)])


def search_page(found: Found, plan: Plan) -> str:
    """Return the best layouts as a table, with the overrides to paste, and where the config's own stands."""
    hardware = plan.hardware
    lines = [
        f"{found.legal:,} legal layouts, {found.fitting:,} hold at most {TIGHT:.0%} of the "
        f"{hardware.memory_bytes / GIB:.1f} GiB of {hardware.name}",
    ]
    if found.best:
        lines.append(f"  {'tokens/s':>10} {'MFU':>6} {'GiB':>6} {'hours':>9}  overrides")
    left = max(0, plan.survey.derived.train_tokens - plan.survey.ledger.tokens)
    for candidate in found.best:
        speed = candidate.speed
        changes = " ".join(candidate.overrides(plan.survey.config)) or "(the config as it is)"
        lines.append(
            f"  {speed.tokens_per_s:>10,.0f} {speed.mfu:>6.1%} {candidate.worst.total / GIB:>6.1f} "
            f"{left / speed.tokens_per_s / 3600:>9,.1f}  {changes}"
        )
    if not found.best:
        lines.append("none fits: use more GPUs (--gpus), larger ones (--hardware), or optimizer.cpu_offload_ratio")
    return "\n".join([*lines, why_not(found, hardware)])


def _what(plan: Plan, schedule: str) -> Iterator[str]:
    config, arch, derived = plan.survey.config, plan.survey.arch, plan.survey.derived
    parallel, batch = config.parallel, config.batch
    yield f"plan of {config.job_name}"
    yield _row("model", f"{arch.family}, {arch.num_parameters / 1e9:.2f} billion parameters ({arch.num_parameters:,})")
    if config.model.rope is not None:
        scaling = arch.rope_scaling
        stretched = "" if scaling is None else f", stretched {scaling.factor:g} times"
        yield _row("positions", f"{arch.positions:,}, rotary base {arch.rope_theta:g}{stretched} (model.rope)")
    yield _row("ranks", f"{derived.world_size} = {parallel.nodes} nodes x {parallel.gpus_per_node}")
    yield _row(
        "layout",
        parallel.describe() + (", sequence parallel" if derived.sequence_parallel else ""),
    )
    yield _row("layers per stage", ", ".join(map(str, derived.layers_per_stage or ())))
    yield _row("vocabulary rows", f"{arch.vocab_size:,} padded to {derived.padded_vocab_size:,}")
    yield _row(
        "one step",
        f"{derived.tokens_per_step:,} tokens = {batch.global_batch_size} samples x {batch.seq_length} tokens, "
        f"{derived.gradient_accumulation_steps} micro-batches of {batch.micro_batch_size}",
    )
    yield _row("budget", f"{derived.train_tokens:,} tokens = {derived.train_iters:,} iterations")
    yield from _phases(plan)
    if plan.survey.ledger.tokens:
        yield _row("trained so far", f"{plan.survey.ledger.tokens:,} tokens")
    yield _row("warm-up", f"{derived.warmup_tokens:,} tokens")
    yield _row("schedule", f"{config.schedule.kind}, lr {config.optimizer.lr:g} to {config.optimizer.min_lr:g}")
    yield _row("", schedule)
    yield _row("run folder", config.folder)


def _phases(plan: Plan) -> Iterator[str]:
    config, start = plan.survey.config, 0
    for asked in config.phases:
        phase = phase_at(config, start)
        end = plan.survey.derived.train_tokens if asked is config.phases[-1] else phase.end_tokens
        first, last = (shares_at(phase.mix, tokens) for tokens in (start, end))
        shares = ", ".join(
            f"{name} {share:.0%}" + (f" to {last[name]:.0%}" if last[name] != share else "")
            for name, share in first.items()
            if share or last[name]
        )
        rates = [learning_rate(phase, tokens) for tokens in (start, end)]
        yield _row(
            f"phase {phase.name}",
            f"{start:,} to {end:,} tokens, a step of {phase.batch_size.full} samples x {phase.seq_length} tokens",
        )
        yield _row("", f"lr {rates[0]:.3g} to {rates[1]:.3g} ({asked.rate.course}); {shares or 'no data'}")
        start = end


def _memory(plan: Plan) -> Iterator[str]:
    capacity = plan.hardware.memory_bytes / GIB
    yield f"memory of a GPU in GiB, of {capacity:.1f} ({plan.hardware.name})"
    parts = [part for part in _PARTS if part not in _RARE or any(getattr(stage, part) for stage in plan.stages)]
    yield "  stage  layers " + " ".join(f"{part:>11}" for part in parts)
    for stage in told_apart(plan.stages, lambda stage: stage.total, fullest=7):
        cells = " ".join(f"{getattr(stage, part) / GIB:>11.2f}" for part in parts)
        yield f"  {stage.stage:>5}  {stage.layers:>6} {cells}"
    if plan.worst.host:
        ranks = plan.layout.gpus_per_node
        yield _row("host memory", f"{ranks * plan.worst.host / GIB:.1f} GiB of optimizer state on a node, at most")
    spare = plan.hardware.memory_bytes - plan.worst.total
    share = abs(spare) / plan.hardware.memory_bytes
    says = f"{spare / GIB:.1f} GiB ({share:.0%}) to spare" if spare >= 0 else f"{-spare / GIB:.1f} GiB too much"
    yield _row("verdict", f"{plan.verdict}: {says} on stage {plan.worst.stage}, the fullest")


def _speed(plan: Plan) -> Iterator[str]:
    speed, cost = plan.speed, plan.cost
    low, high = speed.tokens_per_s / (1 + UNCERTAINTY), speed.tokens_per_s * (1 + UNCERTAINTY)
    yield f"speed on {plan.layout.gpus} x {plan.hardware.name}, within {UNCERTAINTY:.0%} nine times in ten"
    yield _row(
        "tokens/s",
        f"{speed.tokens_per_s:,.0f} ({low:,.0f} to {high:,.0f}), {speed.tokens_per_s_per_gpu:,.0f} per GPU, "
        f"MFU {speed.mfu:.1%}",
    )
    shares = {part.name: getattr(speed.step, part.name) / speed.step.total for part in fields(speed.step)}
    parts = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items() if share >= 0.005]
    yield _row("one step", f"{speed.step.total:.3g} s: {', '.join(parts)}")
    without = " without validation, whose size is not known here" if cost.validation_hours is None else ""
    yield _row("time", f"{cost.hours:,.1f} hours ({cost.hours_low:,.1f} to {cost.hours_high:,.1f}){without}")
    price = "" if cost.price is None else f", {cost.price:,.0f} at the given price"
    yield _row("GPU-hours", f"{cost.gpu_hours:,.0f}{price}")


def _disk(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    yield "disk"
    yield _row("checkpoint", f"{format_bytes(disk.checkpoint_bytes)}, {disk.saves:,} saves in the run")
    yield _row("at once", f"{disk.kept:,} checkpoints at most, {format_bytes(disk.peak_bytes)}")


def _data(plan: Plan) -> Iterator[str]:
    if plan.survey.sources:
        yield "data"
    for source in plan.survey.sources:
        yield _row(source.name, _need(source))


def _need(source: SourceNeed) -> str:
    share = f"{source.first_share:.1%}" + (
        f" to {source.last_share:.1%}" if source.last_share != source.first_share else ""
    )
    needed = f"{share} of the tokens: {_about(source.needed_tokens)} needed"
    if source.epochs_at_end is None or source.available_tokens is None:
        return f"{needed}, the dataset is not known here"
    return f"{needed}, an epoch has {_about(source.available_tokens)}: {source.epochs_at_end:.2f} epochs at the end"


def _ends(plan: Plan) -> Iterator[str]:
    if plan.advice:
        yield "advice"
    for advice in plan.advice:
        yield from wrapped(f"  - {advice.text} [{advice.evidence}]")
    for note in plan.notes:
        yield from wrapped(f"note: {note}")
    for finding in plan.survey.findings:
        if finding.only_here:
            yield from wrapped(f"note: not on this machine: {finding.message}")


def _about(tokens: int) -> str:
    """Return a count to three digits: 1350463488 -> '1.35B'."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if tokens >= size:
            return f"{tokens / size:.3g}{suffix}"
    return f"{tokens:,}"


def _row(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_COLUMNS}}{text}"
