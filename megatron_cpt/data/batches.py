"""The run's data: from a ledger to the micro-batches of the next step, on any layout.

Samples are numbered over the whole run. Step by step the blend says which source gives each sample, from what the
ledger says that each has given, and the ledger where that source stands. Micro-batch i of data-parallel rank r holds
samples [(i * dp + r) * mbs, + mbs) of the step, so a step has the same samples under every layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config.phase import Phase
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.blend import Blend
from megatron_cpt.data.datasets import Datasets, SourcePlan
from megatron_cpt.data.epochs import EpochStream, build_indices
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.micro_batch import MicroBatch, document_ids


@dataclass(frozen=True)
class Sample:
    """Where one training sample lies."""

    number: int  # over the whole run
    source: str
    offset_tokens: int  # from the start of the source's token stream


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, and the ledger after it."""

    samples: tuple[Sample, ...]
    ledger: Ledger
    seq_length: int
    shares: dict[str, float]  # of each source, as the blend says in the middle of the step


class BatchStream:
    """Reads samples. It has no position of its own: everything follows from the ledger it is handed."""

    def __init__(self, streams: dict[str, EpochStream], *, documents_apart: bool = False) -> None:
        self.documents_apart = documents_apart
        self.streams = streams
        self._blend: Blend | None = None

    def plan_step(self, ledger: Ledger, phase: Phase) -> StepPlan:
        """The samples of the next step after `ledger`, in `phase`."""
        if self._blend is None or self._blend.mix != phase.mix:
            self._blend = Blend(phase.mix)
        blend, length, count = self._blend, phase.seq_length, phase.batch_size.at(ledger.tokens)
        ledger = ledger.in_blend(blend.key)
        drawn: Counter[str] = Counter()
        samples = []
        for number, source in enumerate(blend.draw(ledger, count, length), ledger.samples):
            samples.append(Sample(number, source, ledger.sources[source].tokens + drawn[source] * length))
            drawn[source] += 1
        shares = blend.shares_at(ledger.tokens + count * length // 2)
        return StepPlan(tuple(samples), ledger.advanced(drawn, length), length, shares)

    def micro_batches(self, plan: StepPlan, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[MicroBatch]:
        """This data-parallel rank's share of the step, in order."""
        for start in range(dp_rank * micro_batch_size, len(plan.samples), micro_batch_size * dp_size):
            yield self.read(plan.samples[start : start + micro_batch_size], plan.seq_length)

    def read(self, samples: Sequence[Sample], seq_length: int) -> MicroBatch:
        """Return the micro-batch of these samples."""
        pairs = [self.streams[s.source].read(s.offset_tokens, seq_length) for s in samples]
        tokens = torch.stack([tokens for tokens, _ in pairs])
        names = list(self.streams)
        batch: MicroBatch = {
            "tokens": tokens,
            "labels": torch.stack([labels for _, labels in pairs]),
            "loss_mask": torch.ones(tokens.shape, dtype=torch.float32),
            "position_ids": torch.arange(seq_length).expand(len(samples), -1).contiguous(),
            "source": torch.tensor([names.index(sample.source) for sample in samples]),
            "offset_tokens": torch.tensor([sample.offset_tokens for sample in samples]),
        }
        if self.documents_apart:
            ends = torch.tensor([[self.streams[sample.source].dataset.eod_id] for sample in samples])
            batch["document_ids"] = document_ids(tokens, ends)
        return batch

    def documents(self, plan: StepPlan) -> list[dict[str, Any]]:
        """Which documents the step's samples were cut from, for the log of a skipped batch."""
        return [
            {
                "sample": sample.number,
                "source": sample.source,
                "position_tokens": sample.offset_tokens,
                "documents": self.streams[sample.source].documents(sample.offset_tokens, plan.seq_length),
            }
            for sample in plan.samples
        ]


def open_batches(
    config: RunConfig, datasets: Datasets, ledger: Ledger, plans: tuple[SourcePlan, ...], cache_dir: Path
) -> BatchStream:
    """The data of a run from `ledger` on, its missing indices built. Call it before the process group exists."""
    streams = {
        dataset.name: EpochStream(dataset, ledger.sources[dataset.name].block_tokens, config.seed, cache_dir)
        for dataset in datasets.train
    }
    # From the first epoch on: the run may have to fall back to an older checkpoint than the one it was planned from.
    build_indices([(streams[plan.name], _last_epoch(plan) + 1) for plan in plans], cache_dir)
    return BatchStream(streams, documents_apart=config.model.document_attention)


def _last_epoch(plan: SourcePlan) -> int:
    """Index of the epoch that holds the last token needed."""
    end = round(plan.epochs_at_end * plan.available_tokens)
    return max(0, end - 1) // plan.available_tokens
