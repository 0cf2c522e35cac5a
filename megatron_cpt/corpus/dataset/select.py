"""Documents chosen from finished datasets, written as a new one: what `split` and `dedup` of datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpt import __version__
from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.columns import Selection, count_kept
from megatron_cpt.corpus.dataset.indexed import IndexedReader
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord
from megatron_cpt.corpus.dataset.text_rules import common_rules
from megatron_cpt.corpus.dataset.writer import write_files
from megatron_cpt.corpus.staging import staging_folder, write_errors_told


@dataclass(frozen=True)
class ChosenDocuments:
    """A finished dataset and a mask of the documents wanted."""

    reader: IndexedReader
    manifest: Manifest
    wanted: Array

    @property
    def selection(self) -> Selection:
        return self.reader.encoded(), self.wanted


def write_chosen(prefix: str, chosen: Sequence[ChosenDocuments], rejects: dict[str, int]) -> Manifest:
    """Write the chosen documents as a dataset. Shares per source are exact only for one source per dataset."""
    counts = [count_kept(one.selection) for one in chosen]
    tokens = sum(count.tokens for count in counts)
    sources = [
        SourceRecord(Path(one.reader.prefix).name, 1, count.documents, count.tokens, _share(count.tokens, tokens))
        for one, count in zip(chosen, counts, strict=True)
    ]
    template = replace(
        chosen[0].manifest,
        tool_version=__version__,
        document_count=sum(count.documents for count in counts),
        sequence_count=sum(count.sequences for count in counts),
        token_count=tokens,
        input_bytes=sum(one.manifest.input_bytes for one in chosen),
        sources=tuple(sources),
        rejects=rejects,
        config={
            "from": [{"prefix": one.reader.prefix, "bin_sha256": one.manifest.bin_sha256} for one in chosen],
            "text_rules": common_rules([one.manifest for one in chosen]),
        },
    )
    with write_errors_told(prefix), staging_folder(prefix, "rewrite") as staging:
        return write_files(staging, "rewritten", prefix, template, lambda: (one.selection for one in chosen))


def _share(part: int, total: int) -> float:
    return round(part / max(total, 1), 6)
