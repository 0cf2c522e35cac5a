"""What a step counts: sums over tokens, added up over micro batches and ranks, and the result made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class StepSums:
    """Sums over the tokens that count, float64; of one micro batch, or of the global batch once reduced."""

    loss: Tensor  # [], cross entropy
    tokens: Tensor  # []
    terms: Tensor  # [loss terms], in the order of the terms
    source_losses: Tensor  # [data sources]
    source_tokens: Tensor  # [data sources]

    @classmethod
    def zeros(cls, num_terms: int, num_sources: int, device: torch.device) -> StepSums:
        """Return sums of nothing."""
        shapes = {"loss": (), "tokens": (), "terms": (num_terms,)}
        return cls(
            **{
                field.name: torch.zeros(shapes.get(field.name, (num_sources,)), dtype=torch.float64, device=device)
                for field in fields(cls)
            }
        )

    def pack(self) -> Tensor:
        """Return all sums as one vector, in which they can be added, reduced and sent."""
        return torch.cat([getattr(self, field.name).reshape(-1) for field in fields(self)])

    def unpack(self, packed: Tensor) -> StepSums:
        """Return the sums that `packed` holds, in the shapes of these."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = packed.split([tensor.numel() for tensor in own.values()])
        return StepSums(**{name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)})

    @property
    def mean_loss(self) -> float:
        """Cross entropy per token."""
        return float(self.loss / self.tokens.clamp(min=1))


@dataclass(frozen=True)
class Update:
    """What became of the gradients of a step, the same on every rank."""

    grad_norm: float  # before clipping
    refused: str | None  # why the update was left out, so that no parameter changed; None: it was applied
    penalties: dict[str, float]  # value by name


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step over the global batch, the same on every rank."""

    loss_sum: float
    loss_tokens: int
    grad_norm: float  # before clipping
    refused: str | None  # why the update was left out, so that no parameter changed; None: it was applied
    term_sums: dict[str, float]  # by the name of the loss term, weighted as in the loss
    penalties: dict[str, float]  # by name, as added to the mean loss per token
    source_loss_sums: tuple[float, ...]  # one per data source, empty without sources
    source_tokens: tuple[int, ...]

    @classmethod
    def of(cls, sums: StepSums, term_names: Sequence[str], update: Update) -> StepResult:
        """Return the result of the reduced `sums` and what became of the update."""
        return cls(
            loss_sum=float(sums.loss),
            loss_tokens=round(float(sums.tokens)),
            grad_norm=update.grad_norm,
            refused=update.refused,
            penalties=update.penalties,
            term_sums=dict(zip(term_names, sums.terms.tolist(), strict=True)),
            source_loss_sums=tuple(sums.source_losses.tolist()),
            source_tokens=tuple(round(tokens) for tokens in sums.source_tokens.tolist()),
        )

    @property
    def loss(self) -> float:
        """Cross entropy per token, without the loss terms."""
        return self.loss_sum / max(1, self.loss_tokens)

    @property
    def terms(self) -> dict[str, float]:
        """Each loss term per token, and each penalty."""
        return {name: term / max(1, self.loss_tokens) for name, term in self.term_sums.items()} | self.penalties
