"""Build every rank of a layout, one after the other, and compare what they hold, save and exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import Trainable, trainable_of
from megatron_cpt.dry_run.exchange import exchange_faults
from megatron_cpt.dry_run.fake_world import Place, as_rank, prepare_process
from megatron_cpt.dry_run.kernels import modules_of_a_gpu
from megatron_cpt.dry_run.parameters import count_parameters, parameter_faults, saved_faults
from megatron_cpt.dry_run.rank import BuiltRank, StaticBytes, build_rank, build_terms, note_rank
from megatron_cpt.dry_run.schedule import ScheduleRun, enough_micro_batches, run_step
from megatron_cpt.dry_run.tiling import Tiling
from megatron_cpt.train.checkpoint_state import optimizer_sharding

Check = Literal["parameters", "checkpoint", "pipeline"]
OnRank = Callable[[int, int], None]  # (ranks built, ranks in all)


class Fault(NamedTuple):
    """What does not fit together, and which check found it."""

    check: Check
    message: str


@dataclass(frozen=True)
class Stage:
    """What a rank of one pipeline stage holds."""

    stage: int
    ranks: int
    layers: int
    static: StaticBytes  # of the rank of this stage that holds most
    step: ScheduleRun

    @property
    def peak(self) -> int:
        """Bytes on the GPU at the moment that needs most."""
        return self.static.total + self.step.peak


@dataclass(frozen=True)
class DryRun:
    """What is known once every rank was built."""

    ranks: int
    parameters: int  # counted over all ranks, each once, without vocabulary padding
    tensors: int  # of a checkpoint
    shards: int  # that the ranks write
    micro_batches: int  # that the schedule ran
    messages: int  # between the stages, in them
    stages: tuple[Stage, ...]
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def faults_of(self, check: Check) -> int:
        """Return how many faults a check found."""
        return sum(fault.check == check for fault in self.faults)

    @property
    def max_rank_bytes(self) -> int:
        return max(stage.peak for stage in self.stages)


@dataclass
class _Seen:
    """What was noted of the ranks so far."""

    weights: Tiling = field(default_factory=Tiling)
    saved: Tiling = field(default_factory=Tiling)
    static: dict[int, StaticBytes] = field(default_factory=dict)  # by stage, of the rank that holds most
    structures: dict[int, tuple[Place, str]] = field(default_factory=dict)  # by stage, of its first rank
    count: dict[int, int] = field(default_factory=dict)  # ranks by stage
    steps: dict[int, ScheduleRun] = field(default_factory=dict)  # by stage
    faults: list[str] = field(default_factory=list)

    def add(self, rank: BuiltRank) -> None:
        place = rank.place
        self.weights.add(place.rank, rank.weights)
        self.saved.add(place.rank, rank.saved)
        self.count[place.pp] = self.count.get(place.pp, 0) + 1
        held = self.static.setdefault(place.pp, rank.bytes)
        self.static[place.pp] = max(held, rank.bytes, key=lambda static: static.total)
        first, structure = self.structures.setdefault(place.pp, (place, rank.structure))
        if structure != rank.structure:
            self.faults.append(f"{place} has other parameters than {first} of the same pipeline stage")


def dry_run(config: RunConfig, arch: Architecture, derived: Derived, on_rank: OnRank | None = None) -> DryRun:
    """Build every rank of `config`'s layout in this process, and run one rank of each pipeline stage through a step.

    Nothing is assumed of a rank: each is built with its model, gradient buffers, optimizer and checkpoint shards. The
    others of a stage would run the same step as its first rank because they hold parameters of the same names and
    shapes, which is compared.

    Raises:
        ConfigError: the layout or the model asks for what cannot be built.
        LaunchError: this process is part of a job, or sees a GPU.
    """
    prepare_process()
    seen, world_size = _Seen(), derived.world_size
    micro_batches = enough_micro_batches(derived.gradient_accumulation_steps, config.parallel.pp)
    for rank in range(world_size):
        with as_rank(config, rank) as place:
            state = build_rank(config, arch, modules_of_a_gpu(config))
            terms = build_terms(config, arch, modules_of_a_gpu(config))
            seen.add(note_rank(state, place, config.optimizer, terms))
            if place.pp not in seen.steps:
                seen.steps[place.pp] = run_step(state, config, micro_batches, on_gpu=True, terms=terms)
            del state, terms
        if on_rank is not None:
            on_rank(rank + 1, world_size)
    return _compare(config, arch, derived, seen, micro_batches)


def _compare(config: RunConfig, arch: Architecture, derived: Derived, seen: _Seen, micro_batches: int) -> DryRun:
    trainable = trainable_of(config, arch)
    messages = [message for step in seen.steps.values() for message in step.messages]
    return DryRun(
        ranks=sum(seen.count.values()),
        parameters=count_parameters(seen.weights, arch, trainable),
        tensors=len(seen.saved.shapes),
        shards=seen.saved.shards,
        micro_batches=micro_batches,
        messages=sum(message.kind == "send" for message in messages),
        stages=tuple(_stages(derived, seen)),
        faults=tuple(_faults(config, arch, trainable, seen)),
    )


def _stages(derived: Derived, seen: _Seen) -> Iterator[Stage]:
    for stage, layers in enumerate(derived.layers_per_stage or ()):
        yield Stage(stage, seen.count[stage], layers, seen.static[stage], seen.steps[stage])


def _faults(config: RunConfig, arch: Architecture, trainable: Trainable, seen: _Seen) -> Iterator[Fault]:
    parameters = seen.faults + parameter_faults(seen.weights, arch, config.parallel.tp, trainable)
    if not trainable.saves_every_weight:
        parameters += seen.weights.faults()
    checkpoint = seen.saved.faults() + saved_faults(seen.weights, seen.saved, trainable, optimizer_sharding(config))
    pipeline = exchange_faults({stage: step.messages for stage, step in seen.steps.items()})
    yield from (Fault("parameters", message) for message in parameters)
    yield from (Fault("checkpoint", message) for message in checkpoint)
    yield from (Fault("pipeline", message) for message in pipeline)
