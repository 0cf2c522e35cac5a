"""A model under a layout of tensor- and pipeline-parallel ranks, of which rank 0 asks and the others answer.

Only rank 0 reads tasks and tokenizers; it hands each batch to all ranks, so they cannot disagree about it. Whatever is
asked takes one pass through Megatron-Core's own schedule up to the last norm; the output layer sees only the places
that count. The vocabulary stays cut over the tensor-parallel ranks, its padding without probability; of each place a
few numbers are reduced, never all logits, unless logits are what is asked for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_convert.checkpoint import IndexedCheckpoint
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CptError
from megatron_cpt.eval.scorer import Likelihoods
from megatron_cpt.launch.origin import Origin
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

PRECISION = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}
_IDLE_MINUTES = 24 * 60.0  # how long the others wait for rank 0, which may be fetching data


@dataclass(frozen=True)
class Layout:
    """How many ranks hold a model together."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


def eval_config(found: IndexedCheckpoint, layout: Layout, seq_length: int, dtype: str) -> RunConfig:
    """Return a run's config for reading the model `found`; `dtype` is bf16 or fp32.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    return build_config(
        {
            "job_name": "eval",
            "model": {"init_from": str(found.path)},
            "precision": {"dtype": dtype},
            "batch": {"seq_length": seq_length},
            "parallel": {
                "nodes": 1,
                "gpus_per_node": layout.ranks,
                "tp": layout.tp,
                "pp": layout.pp,
                "sequence_parallel": False,
            },
        }
    )


@contextmanager
def joined_ranks(config: RunConfig) -> Iterator[int]:
    """Inside, this process is a rank of the layout of `config`; gives its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core's, of what is not installed
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        adapt_megatron_core_to_cpu()
        from megatron_cpt.runtime.distributed import init_runtime, leave_together, shutdown_runtime

        rank = init_runtime(config, timeout_minutes=_IDLE_MINUTES).rank
    try:
        yield rank
        leave_together()
    finally:
        shutdown_runtime()


def open_layout_model(found: IndexedCheckpoint, config: RunConfig) -> LayoutModel:
    """Build this rank's part of the model `found`, a Hugging Face or torch_dist folder, and load it; collective.

    Raises:
        CheckpointError: on every rank, when the weights are missing, damaged or of another model.
        ConfigError: the model attends within a window shorter than the config's `seq_length`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_cpt.forgetting.reference import load_reference

        origin = Origin("torch_dist" if found.format == "torch_dist" else "hf", found.path)
        return LayoutModel(load_reference(config, found.arch, origin), found.arch.vocab_size)


@dataclass(frozen=True)
class _Likelihoods:
    """See `TaskModel.likelihoods`."""

    inputs: Tensor
    first: int
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class _NextLogits:
    """See `TaskModel.next_logits`."""

    inputs: Tensor
    lengths: Tensor


_Question = _Likelihoods | _NextLogits


class LayoutModel:
    """See `TaskModel`. Rank 0 calls its methods; the other ranks are in `serve` meanwhile."""

    def __init__(self, frozen: Any, vocab_size: int) -> None:
        self._frozen, self._vocab_size = frozen, vocab_size

    def likelihoods(self, inputs: Tensor, first: int, labels: Tensor, rows: Tensor) -> Likelihoods:
        """See `TaskModel`."""
        log_likelihood, greedy_ids = self._ask(_Likelihoods(inputs, first, labels, rows))
        return Likelihoods(log_likelihood, greedy_ids.long() == labels)

    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """See `TaskModel`."""
        return self._ask(_NextLogits(tokens[:, : int(lengths.max())], lengths))

    def release(self, *, failed: bool = False) -> None:
        """Rank 0: let the other ranks leave `serve`; with `failed` they end."""
        self._tell("failed" if failed else None)

    def serve(self) -> None:
        """Answer what rank 0 asks, until it releases this rank.

        Raises:
            CptError: rank 0 has failed.
        """
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                return
            if box[0] == "failed":
                raise CptError("rank 0 has failed", hint="its own message says why")
            self._answer(box[0])

    def _ask(self, question: _Question) -> Tensor:
        self._tell(question)
        return self._answer(question)

    def _tell(self, message: Any) -> None:
        if dist.get_world_size() > 1:
            dist.broadcast_object_list([message], src=0)

    @torch.inference_mode()
    def _answer(self, question: _Question) -> Tensor:
        """Every rank of the layout: one pass. Return [2, r, k] or [b, vocabulary], float32 on the CPU."""
        from megatron.core import parallel_state

        hidden_sbh = self._hidden_states(question.inputs.contiguous())
        device = next(self._frozen.chunks[0].parameters()).device
        if isinstance(question, _Likelihoods):
            shape: tuple[int, ...] = (2, *question.labels.shape)
        else:
            shape = (len(question.inputs), self._vocab_size)
        if hidden_sbh is None:
            result = torch.empty(shape, dtype=torch.float32, device=device)
        elif isinstance(question, _Likelihoods):
            labels, rows = question.labels.to(device), question.rows.to(device)
            result = self._likelihoods(hidden_sbh[question.first :], labels, rows)
        else:
            last = hidden_sbh[question.lengths.to(device) - 1, torch.arange(shape[0], device=device)]
            result = self._all_logits(last[None])[0].contiguous()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(result, parallel_state.get_pipeline_model_parallel_last_rank(), group)
        return result.cpu()

    def _hidden_states(self, inputs: Tensor) -> Tensor | None:
        """[b, n] -> [n, b, hidden] after the last norm; None on other stages than the last."""
        positions = torch.arange(inputs.shape[1]).expand_as(inputs).contiguous()
        batch = {
            "tokens": inputs,
            "labels": inputs,
            "loss_mask": torch.zeros(inputs.shape),
            "position_ids": positions,
        }
        found = self._frozen.hidden_states([batch])
        return found[0] if found else None

    def _logits(self, hidden_sbh: Tensor) -> tuple[Tensor, int, Any]:
        """Return float32 logits [s, b, rows of this rank], their first row's id, and the group that holds all rows."""
        from megatron.core import parallel_state

        logits = self._frozen.logits(hidden_sbh.contiguous()).float()
        start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        real = max(0, self._vocab_size - start)
        if real < logits.shape[-1]:
            logits[..., real:] = float("-inf")
        return logits, start, parallel_state.get_tensor_model_parallel_group()

    def _likelihoods(self, hidden_sbh: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return [2, r, k]: the log-likelihood of each label, and the id of the likeliest token."""
        logits, start, group = self._logits(hidden_sbh)
        width, wanted = logits.shape[-1], labels.t() - start
        own_top, own_id = logits.max(dim=-1)
        top = _reduced(own_top.clone(), dist.ReduceOp.MAX, group)
        # below 2^24 an id is exact in float32
        ids = torch.where(own_top == top, (own_id + start).float(), torch.full_like(top, float("inf")))
        greedy = _reduced(ids, dist.ReduceOp.MIN, group)
        here = (wanted >= 0) & (wanted < width)
        places = torch.arange(len(wanted), device=wanted.device)[:, None]
        target = logits[places, rows, wanted.clamp(0, width - 1)]
        target = _reduced(target.masked_fill(~here, float("-inf")), dist.ReduceOp.MAX, group)
        total = _reduced(logits.sub_(top[..., None]).exp_().sum(dim=-1), dist.ReduceOp.SUM, group)
        normalizer = top + total.log()
        return torch.stack([(target - normalizer[:, rows]).t(), greedy[:, rows].t()]).contiguous()

    def _all_logits(self, hidden_sbh: Tensor) -> Tensor:
        """Return [s, b, vocabulary] on every tensor-parallel rank."""
        logits, _, group = self._logits(hidden_sbh)
        if dist.get_world_size(group) > 1:
            parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, logits, group=group)
            logits = torch.cat(parts, dim=-1)
        return logits[..., : self._vocab_size]


def _reduced(values: Tensor, operation: Any, group: Any) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values
