"""Build one rank as training does, and note what it holds and what it would save."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.optimizer import OptimizerConfig
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.dry_run.fake_world import META, Place
from megatron_cpt.dry_run.live_bytes import storage_bytes
from megatron_cpt.dry_run.shards import Shard, shards_of
from megatron_cpt.forgetting.ewc import WeightPenalty
from megatron_cpt.forgetting.kl import KlTerm, KlToBase, KlToStored
from megatron_cpt.forgetting.reference import FrozenReference, build_reference
from megatron_cpt.model.load_megatron import model_shards
from megatron_cpt.model.owned_parameters import owned_parameters
from megatron_cpt.model.spec import LayerModules
from megatron_cpt.planner.memory import MOMENT_BYTES
from megatron_cpt.train.checkpoint_state import saved_state
from megatron_cpt.train.state import TrainState, build_train_state, unwrap


@dataclass(frozen=True)
class StaticBytes:
    """What a rank holds before its first step, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    host: int  # optimizer state that `optimizer.cpu_offload_ratio` keeps in the host's memory
    reference: int = 0  # the frozen model of forgetting.kl
    penalty: int = 0  # what forgetting.ewc holds

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.penalty


@dataclass(frozen=True)
class BuiltRank:
    """What is kept of a rank when its model is gone."""

    place: Place
    bytes: StaticBytes
    weights: tuple[Shard, ...]  # every weight that the rank holds, also one that no checkpoint holds
    saved: tuple[Shard, ...]  # the rank's part of a checkpoint
    structure: str  # digest of the names, shapes and dtypes of its parameters, in order


def for_the_cluster(config: RunConfig) -> RunConfig:
    """Return `config` without what only a GPU can build. None of it changes a shape; `static_bytes` counts it.

    The parameters gathered during the forward pass would be waited for, and nobody sends them here.
    """
    return config.model_copy(
        update={
            "precision": config.precision.model_copy(update={"fp8": None}),
            "optimizer": config.optimizer.model_copy(update={"cpu_offload_ratio": 0.0, "moments_dtype": "fp32"}),
            "parallel": config.parallel.model_copy(update={"overlap_param_gather": False}),
        }
    )


def build_rank(config: RunConfig, arch: Architecture, modules: LayerModules | None) -> TrainState:
    """Build the model, gradient buffers and optimizer of the rank that this process is (`as_rank`), with its state.

    `modules` are the classes of a layer, by default those of this machine.
    """
    with META:
        state = build_train_state(for_the_cluster(config), arch, read_base=False, modules=modules)
    for optimizer, parameter in _optimizer_parameters(state):
        optimizer.state[parameter].update(exp_avg=torch.empty_like(parameter), exp_avg_sq=torch.empty_like(parameter))
    if (asked := config.forgetting.active_ewc) is not None:
        values = [p.values for p in owned_parameters([unwrap(chunk) for chunk in state.chunks], state.optimizer)]
        base, importance = ([torch.empty_like(tensor) for tensor in values] for _ in range(2))
        state.penalties = (WeightPenalty(asked.strength, base, importance if asked.folder is not None else None),)
    return state


def build_terms(config: RunConfig, arch: Architecture, modules: LayerModules | None) -> tuple[KlTerm, ...]:
    """Build the loss terms of the rank that this process is, with their reference; all tokens count in them."""
    asked = config.forgetting.active_kl
    if asked is None:
        return ()
    asked = asked.model_copy(update={"sources": None})
    if not config.forgetting.runs_reference:
        return (_StoredAsShapes(asked, {}, (), arch.vocab_size),)
    with META:
        reference = FrozenReference(build_reference(for_the_cluster(config), arch, modules))
    return (KlToBase(asked, reference, (), arch.vocab_size),)


class _StoredAsShapes(KlToStored):
    """The term with targets of no values."""

    def _targets(self, batch: MicroBatch, row: int) -> tuple[Tensor, Tensor]:
        length, top_k = batch["tokens"].shape[1], self.asked.offline_top_k or 0
        ids = torch.empty(length, top_k, dtype=torch.int32, device=META)
        return ids, torch.empty(length, top_k + 1, dtype=torch.float16, device=META)


def note_rank(state: TrainState, place: Place, asked: OptimizerConfig, terms: Sequence[KlTerm] = ()) -> BuiltRank:
    """Return what there is to know of a built rank. `asked` is the section of the run's own config."""
    chunks = [unwrap(chunk) for chunk in state.chunks]
    saved = shards_of(saved_state(state))
    return BuiltRank(
        place,
        static_bytes(state, asked, terms),
        tuple(shards_of(model_shards(chunks))),
        tuple(saved),
        _structure(chunks),
    )


def static_bytes(state: TrainState, asked: OptimizerConfig, terms: Sequence[KlTerm] = ()) -> StaticBytes:
    """Count the storages of weights, gradient sums, optimizer state, penalties and the frozen references of `terms`.

    Moments count in the dtype that `asked` names, and the offloaded share of the state counts in the host's memory.
    """
    weights = storage_bytes(p for chunk in state.chunks for p in chunk.parameters())
    gradients = storage_bytes(buffer.grad_data for buffer in _buffers(state))
    owned = [parameter for _, parameter in _optimizer_parameters(state)]
    main = sum(size for key, size in storage_bytes(owned).items() if key not in weights)
    moments = sum(2 * MOMENT_BYTES[asked.moments_dtype] * parameter.numel() for parameter in owned)
    host = int((main + moments) * asked.cpu_offload_ratio)
    reference = sum(storage_bytes(_reference_parameters(terms)).values())
    penalty = sum(storage_bytes(_penalty_tensors(state)).values())
    return StaticBytes(sum(weights.values()), sum(gradients.values()), main + moments - host, host, reference, penalty)


def known_storages(state: TrainState, terms: Sequence[KlTerm] = ()) -> set[int]:
    """Return the storages that `static_bytes` counts."""
    tensors = [p for chunk in state.chunks for p in chunk.parameters()]
    tensors += [buffer.grad_data for buffer in _buffers(state)]
    for optimizer, parameter in _optimizer_parameters(state):
        tensors += [parameter, *optimizer.state[parameter].values()]
    return set(storage_bytes([*tensors, *_reference_parameters(terms), *_penalty_tensors(state)]))


def _penalty_tensors(state: TrainState) -> list[Tensor]:
    return [tensor for penalty in state.penalties for tensor in getattr(penalty, "tensors", ())]


def _reference_parameters(terms: Sequence[KlTerm]) -> list[Tensor]:
    references = [term.reference for term in terms if isinstance(term, KlToBase)]
    return [parameter for reference in references for chunk in reference.chunks for parameter in chunk.parameters()]


def _buffers(state: TrainState) -> Iterator[Any]:
    for chunk in state.chunks:
        yield from chunk.buffers
        yield from chunk.expert_parallel_buffers


def _optimizer_parameters(state: TrainState) -> Iterator[tuple[Any, Tensor]]:
    """The torch optimizers of this rank, each with the tensors that it updates."""
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield part.optimizer, parameter


def _structure(chunks: list[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n".encode())
        digest.update(b"chunk\n")
    return digest.hexdigest()
