"""The loss term that keeps the model near its base: KL divergence of the next token, on all tokens or some sources'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.forgetting import KlConfig
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.forgetting.reference import FrozenReference, load_reference
from megatron_cpt.forgetting.vocab_parallel_kl import vocab_parallel_kl
from megatron_cpt.launch.origin import Origin

_HIDDEN = "kl_reference_hidden"


class KlToBase:
    """A `train.terms.LossTerm`: `weight` times the divergence from `reference`, summed over the tokens that count.

    `source_names` are the run's sources in their order, `vocab_size` counts tokens without padding.
    """

    name: str = "kl"

    def __init__(
        self, asked: KlConfig, reference: FrozenReference, source_names: Sequence[str], vocab_size: int
    ) -> None:
        self.asked, self.reference, self.vocab_size = asked, reference, vocab_size
        self.sequence_axes: Mapping[str, int | None] = {_HIDDEN: None}  # the reference saw this rank's part only
        wanted = None if asked.sources is None else [source_names.index(name) for name in asked.sources]
        self._sources = None if wanted is None else torch.tensor(wanted)

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

    def _any_counts(self, batch: MicroBatch) -> bool:
        return self._sources is None or bool(torch.isin(batch["source"], self._sources).any())

    def _mask(self, batch: MicroBatch) -> Tensor:
        """1 where a token counts, [b, s]."""
        mask = batch["loss_mask"]
        if self._sources is None:
            return mask
        counts = torch.isin(batch["source"], self._sources.to(mask.device))
        return mask * counts.unsqueeze(1).to(mask.dtype)


def kl_terms(
    config: RunConfig, arch: Architecture, origin: Origin, source_names: Sequence[str]
) -> tuple[KlToBase, ...]:
    """Return the KL term of a run with its reference loaded from `origin`, nothing where it has no effect.

    Raises:
        CheckpointError: on every rank, when the reference's weights are missing, damaged or of another model.
    """
    asked = config.forgetting.active_kl
    if asked is None:
        return ()
    return (KlToBase(asked, load_reference(config, arch, origin), source_names, arch.vocab_size),)
