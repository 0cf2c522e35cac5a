"""Turns the loop's results into rows of metrics.jsonl and lines on the console; silent on ranks other than 0."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.config.derive import Derived
from megatron_cpt.config.trainable import Trainable
from megatron_cpt.data.batches import StepPlan
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.console_view import ConsoleView
from megatron_cpt.train.metrics import MetricsFile
from megatron_cpt.train.position import Position
from megatron_cpt.train.step_sums import StepResult
from megatron_cpt.train.throughput import peak_flops


@dataclass(frozen=True)
class StepRecord:
    """One step as the loop hands it to the reporter."""

    position: Position  # after the step
    result: StepResult
    lr: float
    plan: StepPlan
    phase: str  # its name, empty in a run without phases
    clock: LapClock
    show: bool  # whether its row is due; a skipped step is always shown


class StepReporter:
    """Rows and lines of rank 0; on other ranks without a file or a view, and then silent."""

    def __init__(
        self,
        trainable: Trainable,
        derived: Derived,
        source_names: list[str],
        metrics: MetricsFile | None,
        view: ConsoleView | None,
    ) -> None:
        self.derived = derived
        self.source_names = source_names
        self.metrics = metrics
        self.view = view
        self._trainable = trainable
        self._peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._validated = ""  # name of the set that is measured now
        self._rate: float | None = None  # tokens per second, smoothed

    def step(self, record: StepRecord) -> None:
        result, position = record.result, record.position
        step_seconds = record.clock.total
        rate = len(record.plan.samples) * record.plan.seq_length / step_seconds
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        if self.metrics is None or not (record.show or result.refused is not None):
            return
        remaining = max(0, self.derived.train_tokens - position.ledger.tokens)
        row: dict[str, Any] = {
            "iteration": position.iteration,
            "consumed_tokens": position.ledger.tokens,
            **({"phase": record.phase} if record.phase else {}),
            "loss": result.loss,
            "loss_by_source": {
                name: loss / tokens
                for name, loss, tokens in zip(
                    self.source_names, result.source_loss_sums, result.source_tokens, strict=True
                )
                if tokens
            },
            **self._shares(record),
            **({"loss_terms": result.terms} if result.terms else {}),
            "lr": record.lr,
            "grad_norm": result.grad_norm,
            "skipped": result.refused is not None,
            "global_batch_size": len(record.plan.samples),
            "step_seconds": round(step_seconds, 4),
            **{f"{part}_seconds": seconds for part, seconds in record.clock.rounded().items()},
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_gpu": round(rate / self.derived.world_size, 1),
            "mfu": self._mfu(rate, record.plan.seq_length),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "remaining_tokens": remaining,
            "eta_seconds": round(remaining / self._rate, 1),
        }
        self.metrics.write(**row)
        if self.view is not None:
            self.view.step(row, self.derived.train_iters, self.derived.train_tokens)

    def _shares(self, record: StepRecord) -> dict[str, Any]:
        """What each source has given so far, and its share of the step beside what the schedule says."""
        read = {name: source.tokens for name, source in record.position.ledger.sources.items()}
        given = dict(zip(self.source_names, record.result.source_tokens, strict=True))
        whole = max(1, sum(given.values()))
        return {
            "tokens_by_source": read,
            "share_by_source": {name: round(tokens / whole, 6) for name, tokens in given.items()},
            "scheduled_share_by_source": {name: round(share, 6) for name, share in record.plan.shares.items()},
        }

    def validation(self, position: Position, name: str, loss: float, tokens: int, seconds: float) -> None:
        if self.metrics is None:
            return
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self.event(
            "validation",
            position,
            f"validation {name}: loss {loss:.4f}, perplexity {perplexity:,.3f} on {tokens:,} tokens",
            name=name,
            loss=loss,
            perplexity=perplexity,
            tokens=tokens,
            seconds=round(seconds, 3),
        )

    def validating(self, position: Position, name: str) -> None:
        """A validation begins: a row, so that others see what the run does, and the name for its progress."""
        self._validated = name
        self.event("validating", position, "", name=name)

    def validation_progress(self, done: int, total: int) -> None:
        """So many of the micro batches of the validation are measured."""
        if self.view is not None:
            self.view.validation(self._validated, done, total)

    def skipped(self, position: Position, text: str, samples: list[dict[str, Any]]) -> None:
        """A step that was not applied, with the documents that its samples were cut from."""
        self.event("skipped", position, text, reason=text, samples=samples)

    def event(self, event: str, position: Position, text: str, **fields: Any) -> None:
        """Something that is not a step: a row with the name of the event, and a line if there is a `text`."""
        if self.metrics is not None:
            self.metrics.write(
                event=event, iteration=position.iteration, consumed_tokens=position.ledger.tokens, **fields
            )
        if self.view is not None and text:
            self.view.line(text)

    def close(self) -> None:
        if self.view is not None:
            self.view.close()
        if self.metrics is not None:
            self.metrics.close()

    def _mfu(self, tokens_per_second: float, seq_length: int) -> float | None:
        if self._peak is None:
            return None
        return round(
            tokens_per_second * self._trainable.flops_per_token(seq_length) / (self._peak * self.derived.world_size), 4
        )


def peak_memory_gib() -> float:
    """Largest memory so far of this rank: of its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
