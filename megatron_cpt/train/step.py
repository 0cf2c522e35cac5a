"""One optimizer step, and one forward-only pass for validation, through Megatron-Core's pipeline schedules.

The loss is a sum over tokens and a count of tokens, reduced over all ranks: their quotient is the token-weighted
mean of the global batch, whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpt.data.micro_batch import MicroBatch, on_this_rank
from megatron_cpt.model.attention import document_starts
from megatron_cpt.model.owned_parameters import owned_parameters
from megatron_cpt.model.pipeline import run_pipeline
from megatron_cpt.train.state import TrainState, gathered_parameters, unwrap
from megatron_cpt.train.step_sums import StepResult, StepSums, Update
from megatron_cpt.train.terms import LossTerm

# (loss per token, gradient norm) of the global batch, both finite -> why the parameters must not be updated, None when
# they may be; the same on every rank
Refuse = Callable[[float, float], str | None]


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    *,
    num_sources: int = 0,
    terms: Sequence[LossTerm] = (),
    refuse: Refuse | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, update. The learning rate in the optimizer's groups is the caller's.

    An update whose loss or gradient is not finite, or that `refuse` has a reason against, is left out and reported.
    """
    for term in terms:
        term.before_step(micro_batches)
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    sums = run_schedule(state, micro_batches, num_sources, terms, forward_only=False)
    return StepResult.of(sums, [term.name for term in terms], _update(state, sums.mean_loss, refuse))


@torch.no_grad()
def evaluate_step(
    state: TrainState, micro_batches: Iterable[MicroBatch], on_progress: Callable[[int, int], None] | None = None
) -> tuple[float, int]:
    """Return the loss sum and the token count of the micro batches of all data-parallel ranks, without a gradient.

    Ranks of different data-parallel index may bring different numbers of micro batches. `on_progress` is told, on this
    rank, how many of how many micro batches were taken.
    """
    todo = list(micro_batches)
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    while todo and len(state.chunks) > 1 and len(todo) % pp:  # the interleaved schedule works in rounds of PP
        padding = todo[-1].copy()
        padding["loss_mask"] = torch.zeros_like(padding["loss_mask"])
        todo.append(padding)
    with gathered_parameters(state):
        for chunk in state.chunks:
            chunk.eval()
        watched = todo if on_progress is None else _Watched(todo, on_progress)
        sums = run_schedule(state, watched, 0, (), forward_only=True)
        for chunk in state.chunks:
            chunk.train()
    return float(sums.loss), round(float(sums.tokens))


class _Watched(list[MicroBatch]):
    """Micro batches that tell how many of them were taken."""

    def __init__(self, micro_batches: list[MicroBatch], on_progress: Callable[[int, int], None]) -> None:
        super().__init__(micro_batches)
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, micro_batch in enumerate(super().__iter__()):
            self._on_progress(number, len(self))
            yield micro_batch


def run_schedule(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    num_sources: int,
    terms: Sequence[LossTerm],
    *,
    forward_only: bool,
) -> StepSums:
    """Run the pipeline over the micro batches and return their sums over all ranks."""
    sums = StepSums.zeros(len(terms), num_sources, state.device)
    packed = sums.pack()
    if micro_batches:
        forward_step = partial(_forward_step, num_sources=num_sources, terms=terms)
        for report in run_pipeline(state.chunks, micro_batches, forward_step, forward_only=forward_only):
            packed += report
    dist.all_reduce(packed, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(packed, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return sums.unpack(packed)


def _forward_step(
    batches: Iterator[MicroBatch], model: Any, *, num_sources: int, terms: Sequence[LossTerm]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron-Core's forward step: the model's output, and the function that makes a loss of it."""
    bare = unwrap(model)
    batch = on_this_rank(
        next(batches),
        next(bare.parameters()).device,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        {name: axis for term in terms for name, axis in term.sequence_axes.items()},
    )
    documents = document_starts(batch["document_ids"]) if "document_ids" in batch else None
    if terms:  # logits stay in the dtype of the model: a copy of all of them in fp32 is the largest tensor of the step
        options = {"fp32_output": False} if bare.config.bf16 else {}
        output = model(batch["tokens"], batch["position_ids"], documents, **options)
        return output, partial(_loss_of_logits, bare, batch, num_sources, terms)
    output = model(batch["tokens"], batch["position_ids"], documents, labels=batch["labels"])
    return output, partial(_loss, batch, num_sources, ())


def _loss(
    batch: MicroBatch, num_sources: int, terms: Sequence[Tensor], losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [b, s] per token -> what Megatron-Core differentiates, its token count, and the packed sums to report.

    The triple, with `calculate_per_token_loss`, makes Megatron-Core divide the gradient once by the tokens of the
    global batch; a pair would weigh micro batches instead of tokens, and multiply by the context-parallel size.
    """
    mask = batch["loss_mask"]
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    sums = StepSums.zeros(len(terms), num_sources, losses.device)
    per_sample = (losses.detach().double() * mask).sum(dim=1)
    sums.loss.copy_(per_sample.sum())
    sums.tokens.copy_(tokens)
    for index, term in enumerate(terms):
        sums.terms[index] = term.detach()
        total = total + term
    if num_sources:
        sums.source_losses.index_add_(0, batch["source"], per_sample)
        sums.source_tokens.index_add_(0, batch["source"], mask.sum(dim=1).double())
    return total, tokens.to(torch.int), sums.pack()


def _loss_of_logits(
    bare: Any, batch: MicroBatch, num_sources: int, terms: Sequence[LossTerm], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_loss`, from logits [b, s, v], with the terms. The cross entropy overwrites what it is given."""
    logits_sbv = logits.transpose(0, 1)
    values = [term(logits_sbv, batch) for term in terms]
    losses = bare.compute_language_model_loss(batch["labels"], logits_sbv.clone(memory_format=torch.contiguous_format))
    return _loss(batch, num_sources, values, losses)


def _update(state: TrainState, loss: float, refuse: Refuse | None) -> Update:
    """Add the penalties, clip and update; an update that is not wanted is left out.

    Megatron-Core's own step would apply a NaN; these are its parts (ChainedOptimizer.step in 0.16), with a check, and
    with the clipping in place: Megatron-Core's goes through a second copy of each gradient where apex is missing.
    """
    optimizer = state.optimizer
    overflow = optimizer.prepare_grads()
    penalties = _add_penalties(state)
    grad_norm = float(optimizer.get_grad_norm())
    if overflow or not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Update(grad_norm, f"not finite: loss {loss}, gradient norm {grad_norm}", penalties)
    if refuse is not None and (reason := refuse(loss, grad_norm)) is not None:
        return Update(grad_norm, reason, penalties)
    _clip(state, grad_norm)
    optimizer.step_with_ready_grads()
    return Update(grad_norm, None, penalties)


@torch.no_grad()
def _add_penalties(state: TrainState) -> dict[str, float]:
    """Add the gradients of all penalties. Return the values of those that report one, over all ranks."""
    if not state.penalties:
        return {}
    owned = owned_parameters([unwrap(chunk) for chunk in state.chunks], state.optimizer)
    parts = {penalty.name: penalty.add_gradients(owned) for penalty in state.penalties}
    values = {name: value.double() for name, value in parts.items() if value is not None}
    if not values:
        return {}
    summed = torch.stack(list(values.values()))
    dist.all_reduce(summed)
    return dict(zip(values, summed.tolist(), strict=True))


def _clip(state: TrainState, grad_norm: float) -> None:
    clip = state.config.optimizer.clip_grad
    for part in state.optimizer.chained_optimizers:
        if clip > 0.0 and grad_norm > clip and not getattr(part, "is_stub_optimizer", False):
            precise = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            grads = [p.decoupled_grad if precise else p.grad for p in part.get_parameters()]
            torch._foreach_mul_([grad for grad in grads if grad is not None], clip / (grad_norm + 1e-6))
