"""`parallel`: how the model is laid out over the ranks, and which layouts are legal.

Megatron-Core notices many an illegal one only after minutes, some as a hang, and one, TP across nodes, never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem, divisors
from megatron_cpt.config.section import Positive, Section, Sections


class ParallelConfig(Section):
    """How the model is laid out. Data parallelism is what remains: dp = nodes * gpus_per_node / (tp * pp * cp)."""

    nodes: Positive = Field(1, description="Machines of the job.")
    gpus_per_node: Positive = Field(1, description="GPUs per machine; on a CPU host: processes.")
    tp: Positive = Field(1, description="Tensor-parallel ranks, all within one node.")
    pp: Positive = Field(1, description="Pipeline stages.")
    vpp: Positive | None = Field(None, description="Virtual pipeline chunks per stage (interleaved schedule).")
    first_stage_layers: Positive | None = Field(
        None, description="Layers of the first pipeline stage; default: an equal share of what the last one leaves."
    )
    last_stage_layers: Positive | None = Field(
        None,
        description="Layers of the last pipeline stage, which also computes the logits and the loss: with fewer layers "
        "it takes as long as the others. Default: an equal share of what the first one leaves.",
    )
    cp: Positive = Field(1, description="Context-parallel ranks that share one sequence.")
    sequence_parallel: bool | None = Field(
        None,
        description="Shard norms and dropout along the sequence within the TP group; default: on when tp > 1.",
    )
    distributed_optimizer: bool = Field(True, description="Shard optimizer state over data-parallel ranks.")
    overlap_grad_reduce: bool = Field(False, description="Overlap the gradient reduction with the backward pass.")
    overlap_param_gather: bool = Field(False, description="Overlap the parameter all-gather with the forward pass.")

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold the model once."""
        return self.tp * self.pp * self.cp

    @property
    def divides_ranks(self) -> bool:
        """Whether the ranks make whole replicas of the model."""
        return self.world_size % self.model_parallel_size == 0

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model, where `divides_ranks`."""
        return self.world_size // self.model_parallel_size

    @property
    def uses_sequence_parallel(self) -> bool:
        """On with tensor parallelism unless it is switched off, never without it."""
        return self.tp > 1 and self.sequence_parallel is not False

    def describe(self) -> str:
        """The layout in the words of a page; for one that `divides_ranks`."""
        virtual = f", {self.vpp} virtual stages" if self.vpp else ""
        return f"TP {self.tp} x PP {self.pp} x CP {self.cp} x DP {self.data_parallel_size}{virtual}"

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...] | None:
        """Return the layers of each pipeline stage as Megatron-Core distributes them, None where they do not fit.

        What the first and the last stage do not take is shared equally by the stages that were not given a number.
        """
        first, last, chunks = self.first_stage_layers, self.last_stage_layers, self.vpp or 1
        if self.pp == 1:
            return (num_layers,) if first is None and last is None else None
        middle = self.pp - (first is not None) - (last is not None)
        rest = num_layers - (first or 0) - (last or 0)
        if (rest != 0) if middle == 0 else (rest <= 0 or rest % middle):
            return None
        between = (rest // middle,) * middle if middle else ()
        stages = (*(() if first is None else (first,)), *between, *(() if last is None else (last,)))
        return stages if all(layers % chunks == 0 for layers in stages) else None

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        yield from _rank_problems(self)
        yield from _stage_problems(self)
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            yield Problem(
                "parallel.overlap_param_gather",
                True,
                "needs distributed_optimizer and overlap_grad_reduce",
                "switch both on, or this off",
            )
        if arch is not None:
            yield from _width_problems(self, arch)
            yield from _depth_problems(self, arch.num_layers)


def _rank_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    """How the ranks divide among tp, pp, cp and dp."""
    if parallel.gpus_per_node % parallel.tp:
        yield Problem(
            "parallel.tp",
            parallel.tp,
            f"must divide gpus_per_node = {parallel.gpus_per_node}: tensor parallelism "
            "across nodes is bound by the network",
            f"one of {divisors(parallel.gpus_per_node)}",
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", True, "needs tp > 1", "leave it out")
    if not parallel.divides_ranks:
        world_size, model_ranks = parallel.world_size, parallel.model_parallel_size
        yield Problem(
            "parallel",
            None,
            f"tp x pp x cp = {parallel.tp} x {parallel.pp} x {parallel.cp} = {model_ranks} must divide "
            f"nodes x gpus_per_node = {parallel.nodes} x {parallel.gpus_per_node} = {world_size}",
            f"choose a product among {divisors(world_size, world_size)}",
        )


def _stage_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    """Whether there are stages at all, and chunks within them."""
    if parallel.vpp is not None and parallel.pp < 2:
        yield Problem("parallel.vpp", parallel.vpp, "virtual stages need pp > 1", "leave vpp out or set parallel.pp")
    for name in ("first_stage_layers", "last_stage_layers"):
        layers = getattr(parallel, name)
        if layers is None:
            continue
        if parallel.pp < 2:
            yield Problem(f"parallel.{name}", layers, "needs pp > 1", "leave it out or set parallel.pp")
        elif parallel.vpp and layers % parallel.vpp:
            yield Problem(
                f"parallel.{name}",
                layers,
                f"must divide into vpp = {parallel.vpp} chunks",
                f"a multiple of {parallel.vpp}",
            )


def _width_problems(parallel: ParallelConfig, arch: Architecture) -> Iterator[Problem]:
    legal_tp = divisors(math.gcd(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size))
    for what, count in (
        ("attention heads", arch.num_attention_heads),
        ("key/value heads", arch.num_query_groups),
        ("MLP rows", arch.ffn_hidden_size),
    ):
        if count % parallel.tp:
            yield Problem(
                "parallel.tp",
                parallel.tp,
                f"must divide the model's {count} {what}",
                f"one of {legal_tp}",
            )


def _depth_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[Problem]:
    """Whether the model's layers come out even over the stages, or as first and last stage ask."""
    if parallel.layers_per_stage(num_layers) is not None or any(_stage_problems(parallel)):
        return
    if parallel.first_stage_layers is None and parallel.last_stage_layers is None:
        yield _even_stages_problem(parallel, num_layers)
    else:
        yield _uneven_stages_problem(parallel, num_layers)


def _even_stages_problem(parallel: ParallelConfig, num_layers: int) -> Problem:
    legal = _legal_stage_layers(parallel, "last_stage_layers", num_layers)
    name, value = ("pp", parallel.pp) if parallel.vpp is None else ("vpp", parallel.vpp)
    return Problem(
        f"parallel.{name}",
        value,
        f"pp x vpp = {parallel.pp * (parallel.vpp or 1)} must divide the model's {num_layers} layers",
        f"a product among {divisors(num_layers, 128)}"
        + (f"; or parallel.last_stage_layers, one of {legal}" if legal else ""),
    )


def _uneven_stages_problem(parallel: ParallelConfig, num_layers: int) -> Problem:
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    name = "last_stage_layers" if last is not None else "first_stage_layers"
    other = "" if first is None or last is None else f" with first_stage_layers = {first}"
    shared = parallel.pp - (first is not None) - (last is not None)
    chunks = f" in {parallel.vpp} chunks each" if parallel.vpp else ""
    rule = (
        f"must leave layers that {shared} other stage{'s' if shared > 1 else ''}{chunks} share equally"
        if shared
        else "must be what the first stage leaves"
    )
    legal = _legal_stage_layers(parallel, name, num_layers)
    return Problem(
        f"parallel.{name}",
        getattr(parallel, name),
        f"of the model's {num_layers} layers{other} it {rule}",
        f"one of {legal}" if legal else "another parallel.pp, or leave it out",
    )


def _legal_stage_layers(parallel: ParallelConfig, name: str, num_layers: int) -> list[int]:
    """Return values of `name` that make a legal split of the model, the rest of the layout being as it is."""
    asked = getattr(parallel, name) or num_layers // parallel.pp
    legal = [n for n in range(1, num_layers) if parallel.model_copy(update={name: n}).layers_per_stage(num_layers)]
    return sorted(sorted(legal, key=lambda n: abs(n - asked))[:8])
