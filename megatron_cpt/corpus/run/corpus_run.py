"""A run of `preprocess` as all its stages see it: made once, before the workers are forked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megatron_cpt.corpus.dedup.minhash import signer
from megatron_cpt.corpus.filters.build import build_steps
from megatron_cpt.corpus.filters.decontamination import Decontaminator
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.filters.time_limit import with_time_limit
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.readers.sample import probe_sources, sample_texts
from megatron_cpt.corpus.readers.streams import units_of
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.run.fingerprint import output_fingerprint
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.schema_processing import Passages
from megatron_cpt.corpus.staging import staging_path
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer
from megatron_cpt.corpus.workers import worker_count

WHOLE = "all"  # the name of the only part of a unit when the corpus is not split
# A stream larger than this part of a shard's share of the corpus is decoded by all shards, each for its own pieces.
LARGE_PART_OF_SHARE = 0.25

OnUnit = Callable[[UnitRecord], None]
# The name of a stage, the bytes of its units; 0 where they are not counted.
StartProgress = Callable[[str, int], OnUnit]


@dataclass(frozen=True)
class Shard:
    """One of `count` parties that share a run."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class CorpusRun:
    """The corpus, everything that was loaded for it, and which of its units this process does."""

    corpus: Corpus
    planned: Sequence[Unit]
    tokenizer: CorpusTokenizer
    steps: dict[str, list[Step]]  # by source
    fingerprint: str  # of the datasets that come out
    workers: int
    start_progress: StartProgress | None = None
    shard: Shard = field(default_factory=Shard)

    @property
    def staging(self) -> Path:
        return staging_path(self.corpus.output_prefix)

    @property
    def has_eod(self) -> bool:
        """Whether every document ends with the EOD, by the corpus's word or by the tokenizer's."""
        return self.corpus.append_eod or self.tokenizer.ends_with_eod

    @property
    def splits(self) -> list[str]:
        return list(self.corpus.split) or [WHOLE]

    @property
    def passages(self) -> Passages | None:
        return self.corpus.dedup.passages if self.corpus.dedup else None

    def stage(self, name: str) -> str:
        """The name of a stage and where it stands among those of this run: `tokenise 2/3`."""
        dedup = self.corpus.dedup
        stages = ["clean"] if dedup and dedup.passages else []
        stages += ["tokenise", *(["find duplicates"] if dedup and dedup.compares_documents else []), "write"]
        return f"{name} {stages.index(name) + 1}/{len(stages)}"

    def begin(self, name: str, of_what: str) -> None:
        """Say that a stage begins whose progress is not counted in bytes."""
        if self.start_progress is not None:
            self.start_progress(f"{self.stage(name)}: {of_what}", 0)

    @property
    def lists_documents(self) -> bool:
        """Whether every document gets a line in PREFIX.documents.jsonl: when any source keeps metadata."""
        return any(source.metadata for source in self.corpus.sources)

    def of_all_shards(self) -> CorpusRun:
        return replace(self, shard=Shard())

    def takes(self, unit: Unit) -> bool:
        """Units go to the shards in turn; so do the pieces of a large stream, those of a small one go to one shard."""
        turn = unit.number + (unit.piece or 0) * self._is_shared(self.planned[unit.number])
        return turn % self.shard.count == self.shard.index

    def reads(self, stream: Unit) -> bool:
        """Whether this shard decodes a stream."""
        return self._is_shared(stream) or self.takes(stream)

    def _is_shared(self, planned: Unit) -> bool:
        return planned.is_stream and planned.size_bytes > self._share_bytes * LARGE_PART_OF_SHARE

    @cached_property
    def _share_bytes(self) -> float:
        return sum(unit.size_bytes for unit in self.planned) / self.shard.count

    def units_in_order(self) -> list[Unit] | None:
        """The shard's units in input order, with the pieces of streams; None until all its streams have been read."""
        units: list[Unit] = []
        for planned in self.planned:
            if not (self.reads(planned) if planned.is_stream else self.takes(planned)):
                continue
            found = units_of(planned, self.staging)
            if found is None:
                return None
            units += filter(self.takes, found)
        return units


def open_run(
    corpus: Corpus, workers: int | None, start_progress: StartProgress | None, shard: Shard | None = None
) -> CorpusRun:
    """Find the input and load the tokenizer and the filters. Raises DataError or ConfigError for what is not there."""
    units = plan_units(corpus)
    probe_sources(corpus, units)
    if corpus.dedup and corpus.dedup.near:
        signer()  # chosen before the workers start, so that a missing rensa is said once
    tokenizer = load_tokenizer(
        corpus.tokenizer,
        eod_token=corpus.eod_token,
        special_tokens_in_text=corpus.special_tokens_in_text,
        post_processor=corpus.post_processor,
        sample=sample_texts(units, corpus.max_document_bytes),
    )
    steps = _steps_by_source(corpus)  # before the fingerprint, whose error for a missing file would be less clear
    fingerprint = output_fingerprint(corpus, units, tokenizer.record())
    return CorpusRun(
        corpus, units, tokenizer, steps, fingerprint, worker_count(workers), start_progress, shard or Shard()
    )


def _steps_by_source(corpus: Corpus) -> dict[str, list[Step]]:
    """Cleaning and filters of each source (its own, else the corpus's), then decontamination."""
    limit = corpus.max_document_seconds
    last: list[Step] = (
        [with_time_limit(Step("decontaminate", Decontaminator(corpus.decontaminate, corpus)), limit)]
        if corpus.decontaminate
        else []
    )
    steps: dict[str, list[Step]] = {}
    for source in corpus.sources:
        clean, filters = source.clean or corpus.clean, source.filters or corpus.filters
        steps[source.name] = build_steps(clean, filters, corpus.keep_empty_documents, limit) + last
    return steps
