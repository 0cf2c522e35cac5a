"""Legal layouts of a model on a number of GPUs, from the fastest that fits to the slowest.

Every layout is a config that `derive` accepts: the rules are the config's own, asked for each candidate whose memory
and speed are worth it. The tokens of a step, the budget and the data stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.problems import divisors
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.parallel import ParallelConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.planner.hardware import Hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import GIB, StageMemory, memory_of_stages, worst_stage
from megatron_cpt.planner.plan import TIGHT
from megatron_cpt.planner.throughput import Shape, Throughput, throughput

SHOWN = 10
_RECOMPUTE: tuple[dict[str, object], ...] = (
    {"granularity": "none"},
    {"granularity": "selective", "modules": ["mlp"]},
    {"granularity": "full"},
)
_MICRO_BATCH_SIZES = (1, 2, 4, 8)
_LARGEST_VPP = 20


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs and gives."""

    config: RunConfig
    layout: Layout
    worst: StageMemory
    speed: Throughput

    def overrides(self, base: RunConfig) -> list[str]:
        """Return the KEY=VALUE overrides that turn `base` into this layout."""
        changed = []
        for section in ("parallel", "batch", "recompute"):
            mine, theirs = getattr(self.config, section), getattr(base, section)
            changed += [
                f"{section}.{key}={_written(getattr(mine, key))}"
                for key in type(mine).model_fields
                if getattr(mine, key) != getattr(theirs, key)
            ]
        return changed


@dataclass(frozen=True)
class Found:
    """What a search found: the best that fit, and where the config's own layout stands."""

    best: tuple[Candidate, ...]
    legal: int
    fitting: int
    own: Candidate | None  # None: it has another number of GPUs, or breaks a rule
    own_place: int | None  # from 1, among those that fit


def search(config: RunConfig, arch: Architecture, hardware: Hardware, gpus: int | None = None) -> Found:
    """Return the fastest layouts that fit on `gpus`, by default the config's own number.

    Raises:
        ConfigError: so many GPUs do not fill nodes of the config's size.
    """
    nodes, per_node = _nodes(config, gpus or config.parallel.world_size)
    fitting: list[Candidate] = []
    legal = 0
    for candidate in _candidates(config, arch, hardware, nodes, per_node):
        legal += 1
        if candidate.worst.total <= TIGHT * hardware.memory_bytes:
            fitting.append(candidate)
    fitting.sort(key=lambda candidate: -candidate.speed.tokens_per_s)
    own = _own(config, arch, hardware) if config.parallel.world_size == nodes * per_node else None
    place = None
    if own is not None and own.worst.total <= TIGHT * hardware.memory_bytes:
        place = 1 + sum(candidate.speed.tokens_per_s > own.speed.tokens_per_s for candidate in fitting)
    return Found(tuple(_distinct(fitting)), legal, len(fitting), own, place)


def why_not(found: Found, hardware: Hardware) -> str:
    """Say where the config's own layout stands, and why it is not the first."""
    own = found.own
    if own is None:
        return "the config's own layout is for another number of GPUs"
    if found.own_place is None:
        over = own.worst.total - TIGHT * hardware.memory_bytes
        return (
            f"the config's own layout is not among them: stage {own.worst.stage} would hold "
            f"{own.worst.total / GIB:.1f} GiB, {over / GIB:.1f} more than is safe"
        )
    if not found.best or found.own_place == 1:
        return "the config's own layout is the fastest that fits"
    first = found.best[0]
    gain = first.speed.tokens_per_s / own.speed.tokens_per_s - 1
    part = _where_it_loses(own, first)
    return (
        f"the config's own layout is number {found.own_place:,} of {found.fitting:,}: the first is {gain:.1%} faster, "
        f"mostly in {part}"
    )


def search_json(found: Found, base: RunConfig, hardware: Hardware) -> dict[str, Any]:
    """Return what was found under stable names."""
    best = [
        {
            "overrides": candidate.overrides(base),
            "tokens_per_s": candidate.speed.tokens_per_s,
            "mfu": candidate.speed.mfu,
            "bytes": candidate.worst.total,
        }
        for candidate in found.best
    ]
    return {
        "search": {
            "best": best,
            "legal": found.legal,
            "fitting": found.fitting,
            "own_place": found.own_place,
            "own": why_not(found, hardware),
        }
    }


def _where_it_loses(own: Candidate, first: Candidate) -> str:
    mine, theirs = own.speed.step, first.speed.step
    names = [part.name for part in dataclasses.fields(mine)]
    return max(names, key=lambda name: getattr(mine, name) - getattr(theirs, name)).replace("_", " ")


def _nodes(config: RunConfig, gpus: int) -> tuple[int, int]:
    """Return nodes and GPUs per node."""
    per_node = config.parallel.gpus_per_node
    if gpus <= per_node:
        return 1, gpus
    if gpus % per_node:
        raise ConfigError(
            f"{gpus} GPUs do not fill nodes of {per_node}",
            hint=f"--gpus {gpus // per_node * per_node} or {(gpus // per_node + 1) * per_node}, or "
            "parallel.gpus_per_node=N",
        )
    return gpus // per_node, per_node


def _candidates(
    config: RunConfig, arch: Architecture, hardware: Hardware, nodes: int, per_node: int
) -> Iterator[Candidate]:
    """Every legal layout. What cannot be legal is left out early; what remains is asked of `derive`."""
    shape = Shape.of(arch)
    for parallel in _parallels(config, arch, nodes, per_node):
        for size in _MICRO_BATCH_SIZES:
            if config.batch.global_batch_size % (size * parallel.data_parallel_size):
                continue
            for recompute in _RECOMPUTE:
                varied = _varied(config, parallel, size, recompute)
                if _is_legal(varied, arch):
                    yield _measured(varied, arch, shape, hardware)


def _parallels(config: RunConfig, arch: Architecture, nodes: int, per_node: int) -> Iterator[ParallelConfig]:
    """Ways to divide the ranks, with even stages, and with a last stage that the head makes shorter."""
    world = nodes * per_node
    for tp in divisors(per_node):
        for pp in divisors(min(world // tp, arch.num_layers), arch.num_layers):
            for cp in divisors(max(1, world // (tp * pp)), 8):
                if world % (tp * pp * cp):
                    continue
                dp = world // (tp * pp * cp)
                basis = config.parallel.model_copy(
                    update={
                        "nodes": nodes,
                        "gpus_per_node": per_node,
                        "tp": tp,
                        "pp": pp,
                        "cp": cp,
                        "vpp": None,
                        "first_stage_layers": None,
                        "last_stage_layers": None,
                        "sequence_parallel": config.parallel.sequence_parallel if tp > 1 else None,
                        "overlap_grad_reduce": dp * cp > 1,
                        "overlap_param_gather": dp * cp > 1 and config.parallel.distributed_optimizer,
                    }
                )
                yield from _stagings(basis, arch.num_layers)


def _stagings(basis: ParallelConfig, layers: int) -> Iterator[ParallelConfig]:
    """The same ranks with every legal number of chunks, and with shorter last stages."""
    if basis.pp == 1:
        yield basis
        return
    for vpp in (None, *(number for number in range(2, _LARGEST_VPP + 1))):
        for last in (None, *range(max(1, layers // basis.pp - 4), layers // basis.pp + 1)):
            staged = basis.model_copy(update={"vpp": vpp, "last_stage_layers": last})
            split = staged.layers_per_stage(layers)
            if split is not None and (last is None or split[-1] != split[0]):
                yield staged


def _varied(config: RunConfig, parallel: ParallelConfig, size: int, recompute: dict[str, object]) -> RunConfig:
    return config.model_copy(
        update={
            "parallel": parallel,
            "batch": config.batch.model_copy(update={"micro_batch_size": size}),
            "recompute": type(config.recompute).model_validate(recompute),
        }
    )


def _is_legal(config: RunConfig, arch: Architecture) -> bool:
    try:
        derive(config, arch)
    except ConfigError:
        return False
    return True


def _measured(config: RunConfig, arch: Architecture, shape: Shape, hardware: Hardware) -> Candidate:
    layout = Layout.of(config, arch)
    return Candidate(config, layout, worst_stage(memory_of_stages(arch, layout)), throughput(shape, layout, hardware))


def _own(config: RunConfig, arch: Architecture, hardware: Hardware) -> Candidate | None:
    return _measured(config, arch, Shape.of(arch), hardware) if _is_legal(config, arch) else None


def _distinct(fitting: list[Candidate]) -> Iterator[Candidate]:
    """The first few that differ in more than the split of the stages."""
    seen = set()
    for candidate in fitting:
        layout = candidate.layout
        key = (layout.tp, layout.pp, layout.cp, layout.vpp, layout.micro_batch_size, layout.recompute)
        if key not in seen:
            seen.add(key)
            yield candidate
        if len(seen) == SHOWN:
            return


def _written(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value)
