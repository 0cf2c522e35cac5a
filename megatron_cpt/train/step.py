"""One optimizer step, and one forward-only pass for validation, through Megatron-Core's pipeline schedules.

A micro batch is a dict of tensors of the whole sequence (context parallelism is cut here):
    tokens, labels, position_ids   int64 [b, s]
    loss_mask                      float32 [b, s], 1 where the label counts
    source                         int64 [b], optional: index of the data source, for the loss per source
    document_ids                   int64 [b, s], optional: changes where a new document begins, and no token attends
                                   beyond that; `model.document_attention` makes the data give it
Every rank is given the same micro batches as its data-parallel peers of other stages and TP or CP ranks.

The loss is a sum over tokens and a count of tokens, reduced over all ranks: their quotient is the token-weighted
mean of the global batch, whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_cpt.model.attention import document_starts
from megatron_cpt.train.state import TrainState, gathered_parameters, unwrap

MicroBatch = dict[str, Tensor]
# (loss per token, gradient norm) of the global batch -> whether the parameters may be updated; the same on every rank
Accept = Callable[[float, float], bool]
# (logits [s, b, padded vocabulary / TP], micro batch on this CP rank) -> a term added to the loss sum of the micro
# batch, on the scale of a sum over its tokens.
ExtraLoss = Callable[[Tensor, MicroBatch], Tensor]

_CUT_BY_CP = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class StepResult:
    """Sums over the global batch, the same on every rank."""

    loss_sum: float
    loss_tokens: int
    grad_norm: float  # before clipping
    skipped: bool  # the gradient was not finite, or was refused: the parameters did not change
    extra_loss_sum: float
    source_loss_sums: tuple[float, ...]  # one per data source, empty without sources
    source_tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean over tokens."""
        return self.loss_sum / max(1, self.loss_tokens)


def train_step(
    state: TrainState,
    batches: Iterator[MicroBatch],
    num_microbatches: int,
    *,
    num_sources: int = 0,
    extra_loss: ExtraLoss | None = None,
    accept: Accept | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, update. The learning rate in the optimizer's groups is the caller's.

    Takes `num_microbatches` from `batches`. An update whose gradient is not finite, or that `accept` refuses, is left
    out, and reported.
    """
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    microbatches = [next(batches) for _ in range(num_microbatches)]
    sums = _run_schedule(state, microbatches, num_sources, extra_loss, forward_only=False)
    loss = float(sums[0] / sums[1].clamp(min=1))
    grad_norm, skipped = _update(state, accept and partial(accept, loss))
    return StepResult(
        loss_sum=float(sums[0]),
        loss_tokens=round(float(sums[1])),
        grad_norm=grad_norm,
        skipped=skipped,
        extra_loss_sum=float(sums[2]),
        source_loss_sums=tuple(sums[3 : 3 + num_sources].tolist()),
        source_tokens=tuple(round(n) for n in sums[3 + num_sources :].tolist()),
    )


@torch.no_grad()
def evaluate_step(state: TrainState, microbatches: Iterable[MicroBatch]) -> tuple[float, int]:
    """(sum of the loss, number of tokens) over the micro batches of all data-parallel ranks, without a gradient.

    Ranks of different data-parallel index may bring different numbers of micro batches.
    """
    todo = list(microbatches)
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    while todo and len(state.chunks) > 1 and len(todo) % pp:  # the interleaved schedule works in rounds of PP
        todo.append(todo[-1] | {"loss_mask": torch.zeros_like(todo[-1]["loss_mask"])})
    with gathered_parameters(state):
        for chunk in state.chunks:
            chunk.eval()
        sums = _run_schedule(state, todo, 0, None, forward_only=True)
        for chunk in state.chunks:
            chunk.train()
    return float(sums[0]), round(float(sums[1]))


def _run_schedule(
    state: TrainState,
    microbatches: list[MicroBatch],
    num_sources: int,
    extra_loss: ExtraLoss | None,
    *,
    forward_only: bool,
) -> Tensor:
    """Loss sum, tokens, extra loss, loss sums per source, tokens per source: float64, summed over all ranks."""
    sums = torch.zeros(3 + 2 * num_sources, dtype=torch.float64, device=state.device)
    if microbatches:
        samples, length = microbatches[0]["tokens"].shape
        iterators = [iter(microbatches) for _ in state.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, num_sources=num_sources, extra_loss=extra_loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=state.chunks if len(state.chunks) > 1 else state.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=samples,
            forward_only=forward_only,
        )
        for report in reports:  # empty except on the last pipeline stage
            sums += report
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return sums


def _forward_step(
    batches: Iterator[MicroBatch], model: Any, *, num_sources: int, extra_loss: ExtraLoss | None
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron-Core's forward step: the model's output, and the function that makes a loss of it."""
    bare = unwrap(model)
    batch = _on_this_rank(next(batches), next(bare.parameters()).device)
    documents = document_starts(batch["document_ids"]) if "document_ids" in batch else None
    labels = batch["labels"] if extra_loss is None else None
    output = model(batch["tokens"], batch["position_ids"], documents, labels=labels)
    if extra_loss is None:
        return output, partial(_loss, batch, num_sources, None)
    return output, partial(_loss_of_logits, bare, batch, num_sources, extra_loss)


def _on_this_rank(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch on this rank's device, its sequences cut to this context-parallel rank's two chunks."""
    cut: MicroBatch = get_batch_on_this_cp_rank({name: batch[name] for name in _CUT_BY_CP})
    moved = {
        name: tensor.to(device, non_blocking=True) for name, tensor in (batch | cut).items() if name != "document_ids"
    }
    return moved | ({"document_ids": batch["document_ids"]} if "document_ids" in batch else {})


def _loss(batch: MicroBatch, num_sources: int, extra: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [b, s] per token -> what Megatron-Core differentiates, its token count, and the sums to report.

    The triple, with `calculate_per_token_loss`, makes Megatron-Core divide the gradient once by the tokens of the
    global batch; a pair would weigh micro batches instead of tokens, and multiply by the context-parallel size.
    """
    mask = batch["loss_mask"]
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    report = torch.zeros(3 + 2 * num_sources, dtype=torch.float64, device=losses.device)
    per_sample = (losses.detach().double() * mask).sum(dim=1)
    report[0], report[1] = per_sample.sum(), tokens
    if extra is not None:
        report[2] = extra.detach()
        total = total + extra
    if num_sources:
        source = batch["source"]
        report[3 : 3 + num_sources].index_add_(0, source, per_sample)
        report[3 + num_sources :].index_add_(0, source, mask.sum(dim=1).double())
    return total, tokens.to(torch.int), report


def _loss_of_logits(
    bare: Any, batch: MicroBatch, num_sources: int, extra_loss: ExtraLoss, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_loss`, from logits [b, s, v], with the second term. The cross entropy overwrites what it is given."""
    logits_sbv = logits.transpose(0, 1)
    extra = extra_loss(logits_sbv, batch)
    losses = bare.compute_language_model_loss(batch["labels"], logits_sbv.clone(memory_format=torch.contiguous_format))
    return _loss(batch, num_sources, extra, losses)


def _update(state: TrainState, accept: Callable[[float], bool] | None) -> tuple[float, bool]:
    """(gradient norm before clipping, whether the update was left out: not finite, or not accepted).

    Megatron-Core's own step would apply a NaN; these are its parts (ChainedOptimizer.step in 0.16), with a check, and
    with the clipping in place: Megatron-Core's goes through a second copy of each gradient where apex is missing.
    """
    optimizer, clip = state.optimizer, state.config.optimizer.clip_grad
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if overflow or not math.isfinite(grad_norm) or not (accept is None or accept(grad_norm)):
        return grad_norm, True
    for part in optimizer.chained_optimizers:
        if clip > 0.0 and grad_norm > clip and not getattr(part, "is_stub_optimizer", False):
            precise = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            grads = [p.decoupled_grad if precise else p.grad for p in part.get_parameters()]
            torch._foreach_mul_([grad for grad in grads if grad is not None], clip / (grad_norm + 1e-6))
    optimizer.step_with_ready_grads()
    return grad_norm, False
