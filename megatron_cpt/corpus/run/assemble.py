"""From parts to datasets: join the parts in unit order, hash while copying, rename the manifest last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.columns import Selection, count_kept
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord
from megatron_cpt.corpus.dataset.text_rules import TextRules
from megatron_cpt.corpus.dataset.writer import write_files
from megatron_cpt.corpus.documents import DocumentCounts
from megatron_cpt.corpus.filters.language import model_file, model_sha256
from megatron_cpt.corpus.run.corpus_run import CorpusRun
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.parts import UnitRecord, read_part


@dataclass(frozen=True)
class Assembly:
    """What is common to all datasets of one run."""

    run: CorpusRun
    done: FinishedUnits
    keep: Mapping[tuple[str, str], Array]  # (unit, split) -> documents to keep, where not all are
    rejects: dict[str, int]

    def write(self, split: str, prefix: str) -> Manifest:
        """Write the dataset of one split from the parts; an older dataset there is replaced."""
        counts = [self._kept_counts(record, split) for record in self.done.records]
        template = Manifest(
            tool_version=__version__,
            complete=True,
            dtype=self.run.tokenizer.dtype,
            document_count=sum(c.documents for c in counts),
            sequence_count=sum(c.sequences for c in counts),
            token_count=sum(c.tokens for c in counts),
            input_bytes=sum(record.size_bytes for record in self.done.records),
            bin_bytes=0,
            idx_bytes=0,
            bin_sha256="",
            idx_sha256="",
            tokenizer=self.run.tokenizer.record(),
            append_eod=self.run.has_eod,
            sources=self._sources(counts),
            rejects=self.rejects,
            config=self._config(),
        )
        return write_files(self.run.staging, split, prefix, template, lambda: self._selections(split))

    def _selections(self, split: str) -> Iterator[Selection]:
        for record in self.done.records:
            yield self._selection(record, split)

    def _selection(self, record: UnitRecord, split: str) -> Selection:
        part = read_part(self.run.staging, record.unit, split, record.parts[split], self.run.tokenizer.dtype)
        return part, self.keep.get((record.unit, split))

    def _kept_counts(self, record: UnitRecord, split: str) -> DocumentCounts:
        """What a part holds after the removal of duplicates."""
        is_whole = (record.unit, split) not in self.keep
        return record.parts[split] if is_whole else count_kept(self._selection(record, split))

    def _sources(self, counts: list[DocumentCounts]) -> tuple[SourceRecord, ...]:
        documents, tokens = Counter[str](), Counter[str]()
        for part, record in zip(counts, self.done.records, strict=True):
            documents[record.source] += part.documents
            tokens[record.source] += part.tokens
        total = max(tokens.total(), 1)
        return tuple(
            SourceRecord(name, files, documents[name], tokens[name], round(tokens[name] / total, 6))
            for name, files in self.done.files_per_source.items()
        )

    def _config(self) -> dict[str, Any]:
        """What the manifest says of the run: the corpus, the plan's identity, and what the corpus's rules removed."""
        config = self.run.corpus.model_dump(mode="json")
        tokenizer = self.run.tokenizer
        rules = TextRules(self.run.corpus.special_tokens_in_text, tokenizer.prefix_ids, tokenizer.suffix_ids)
        config |= {"text_rules": rules.to_json()}
        config |= {"plan": self.run.fingerprint, "documents_read": self.done.documents_read}
        chosen = [self.run.corpus.filters, *(source.filters for source in self.run.corpus.sources)]
        files = [model_file(filters.language) for filters in chosen if filters and filters.language]
        if files:
            config["language_models"] = {path.name: model_sha256(path) for path in files}
        if self.done.notes:
            config["notes"] = self.done.notes
        if self.run.passages:
            config["passages_removed"] = sum(record.passages_removed for record in self.done.records)
            config["passage_chars_removed"] = sum(record.passage_chars_removed for record in self.done.records)
        return config
