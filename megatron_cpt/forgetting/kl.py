"""The loss term that keeps the model near its base: KL divergence of the next token, on all tokens or some sources'.

The base runs beside the model (`KlToBase`), or what it says was stored before (`KlToStored`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.forgetting import KlConfig
from megatron_cpt.data.datasets import Dataset
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.errors import DataError
from megatron_cpt.forgetting.kl_store import KlStore
from megatron_cpt.forgetting.reference import FrozenReference, load_reference
from megatron_cpt.forgetting.topk_kl import topk_kl
from megatron_cpt.forgetting.vocab_parallel_kl import vocab_parallel_kl
from megatron_cpt.launch.kl_targets import counted, read_targets, targets_path
from megatron_cpt.launch.origin import Origin

_HIDDEN = "kl_reference_hidden"
_IDS, _LOG_Q = "kl_ids", "kl_log_q"


class _Counted:
    """Which tokens the term counts. `source_names` are the run's sources in their order."""

    def __init__(self, asked: KlConfig, source_names: Sequence[str]) -> None:
        wanted = None if asked.sources is None else [source_names.index(name) for name in asked.sources]
        self._sources = None if wanted is None else torch.tensor(wanted)

    def _any_counts(self, batch: MicroBatch) -> bool:
        return self._sources is None or bool(torch.isin(batch["source"], self._sources).any())

    def _mask(self, batch: MicroBatch) -> Tensor:
        """1 where a token counts, [b, s]."""
        mask = batch["loss_mask"]
        if self._sources is None:
            return mask
        counts = torch.isin(batch["source"], self._sources.to(mask.device))
        return mask * counts.unsqueeze(1).to(mask.dtype)


class KlToBase(_Counted):
    """A `train.terms.LossTerm`: `weight` times the divergence from `reference`, summed over the tokens that count.

    `source_names` are the run's sources in their order, `vocab_size` counts tokens without padding.
    """

    name: str = "kl"

    def __init__(
        self, asked: KlConfig, reference: FrozenReference, source_names: Sequence[str], vocab_size: int
    ) -> None:
        super().__init__(asked, source_names)
        self.asked, self.reference, self.vocab_size = asked, reference, vocab_size
        self.sequence_axes: Mapping[str, int | None] = {_HIDDEN: None}  # the reference saw this rank's part only

    def before_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Ask the reference about the micro batches in which any token counts."""
        wanted = [batch for batch in micro_batches if self._any_counts(batch)]
        hidden = self.reference.hidden_states(wanted)
        for batch, states in zip(wanted, hidden, strict=bool(hidden)):
            batch.setdefault("term_tensors", {})[_HIDDEN] = states

    def __call__(self, logits_sbv: Tensor, batch: MicroBatch) -> Tensor:
        states = batch.get("term_tensors", {}).get(_HIDDEN)
        if states is None:
            return torch.zeros((), device=logits_sbv.device)
        rows = logits_sbv.shape[-1]
        divergence_sb = vocab_parallel_kl(
            logits_sbv,
            self.reference.logits(states),
            real_rows=self.vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows,
            temperature=self.asked.temperature,
            reverse=self.asked.direction == "reverse",
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return self.asked.weight * (divergence_sb.transpose(0, 1) * self._mask(batch)).sum()


class KlToStored(_Counted):
    """A `train.terms.LossTerm`: as `KlToBase`, from stored targets. `stores` has those of each source that counts.

    Of the vocabulary it tells the stored tokens apart, and takes the others together.
    """

    name: str = "kl"
    sequence_axes: Mapping[str, int | None]

    def __init__(
        self, asked: KlConfig, stores: Mapping[str, KlStore], source_names: Sequence[str], vocab_size: int
    ) -> None:
        super().__init__(asked, source_names)
        self.asked, self.vocab_size = asked, vocab_size
        self._stores = [stores.get(name) for name in source_names]
        self.sequence_axes = {_IDS: 1, _LOG_Q: 1}

    def before_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Read the targets of the micro batches in which any token counts, where the logits will be."""
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        for batch in micro_batches:
            if self._any_counts(batch):
                ids, log_q = zip(*(self._targets(batch, row) for row in range(len(batch["tokens"]))), strict=True)
                tensors = {_IDS: torch.stack(ids), _LOG_Q: torch.stack(log_q)}
                batch.setdefault("term_tensors", {}).update(tensors)

    def _targets(self, batch: MicroBatch, row: int) -> tuple[Tensor, Tensor]:
        """Of one sample: [s, k] and [s, k + 1]; of a source that does not count, something of that shape."""
        length, top_k = batch["tokens"].shape[1], self.asked.offline_top_k or 0
        store = self._stores[int(batch["source"][row])]
        if store is None:
            return torch.zeros(length, top_k, dtype=torch.int32), torch.zeros(length, top_k + 1, dtype=torch.float16)
        ids, log_q = store.read(int(batch["offset_tokens"][row]), length)
        if len(ids) < length:
            end = int(batch["offset_tokens"][row]) + len(ids)
            raise DataError(
                f"the stored targets of forgetting.kl end at token {end:,} of a source, and the run reads on",
                hint="megatron-cpt kl-targets CONFIG goes on where they end",
            )
        return ids, log_q

    def __call__(self, logits_sbv: Tensor, batch: MicroBatch) -> Tensor:
        brought = batch.get("term_tensors", {})
        if _IDS not in brought:
            return torch.zeros((), device=logits_sbv.device)
        first_row = parallel_state.get_tensor_model_parallel_rank() * logits_sbv.shape[-1]
        divergence_sb = topk_kl(
            logits_sbv,
            brought[_IDS].transpose(0, 1),
            brought[_LOG_Q].transpose(0, 1),
            first_row=first_row,
            real_rows=self.vocab_size - first_row,
            temperature=self.asked.temperature,
            reverse=self.asked.direction == "reverse",
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return self.asked.weight * (divergence_sb.transpose(0, 1) * self._mask(batch)).sum()


KlTerm = KlToBase | KlToStored


def kl_terms(config: RunConfig, arch: Architecture, origin: Origin, datasets: Sequence[Dataset]) -> tuple[KlTerm, ...]:
    """Return the KL term of a run on `datasets`, its reference loaded from `origin` or its targets opened.

    Nothing where the term has no effect.

    Raises:
        CheckpointError: on every rank, when the reference's weights are missing, damaged or of another model.
        DataError: stored targets are gone or damaged.
    """
    asked, names = config.forgetting.active_kl, [dataset.name for dataset in datasets]
    if asked is None:
        return ()
    if asked.offline_top_k is None:
        return (KlToBase(asked, load_reference(config, arch, origin), names, arch.vocab_size),)
    stores = {dataset.name: open_store(dataset.prefix) for dataset in counted(config, datasets)}
    return (KlToStored(asked, stores, names, arch.vocab_size),)


def open_store(prefix: str) -> KlStore:
    """Open the targets beside a dataset, to read.

    Raises:
        DataError: there are none, or they are damaged.
    """
    record = read_targets(prefix)
    if record is None:
        raise DataError(f"{targets_path(prefix, 'json')} is gone", hint="megatron-cpt kl-targets CONFIG writes it")
    return KlStore(targets_path(prefix, "ids"), targets_path(prefix, "logq"), record.tokens, record.top_k)
