"""All units of a run and their records, in output order, once every part is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.run.parts import UnitRecord


@dataclass(frozen=True)
class FinishedUnits:
    """`records[i]` is of `units[i]`."""

    units: Sequence[Unit]
    records: Sequence[UnitRecord]

    @cached_property
    def documents_read(self) -> int:
        return sum(record.documents_read for record in self.records)

    @cached_property
    def lines_before(self) -> list[int]:
        """For each unit the number of lines of its file that earlier units hold."""
        seen: Counter[tuple[str, str]] = Counter()
        counts = []
        for unit, record in zip(self.units, self.records, strict=True):
            key = (unit.source, unit.paths[0])
            counts.append(seen[key])
            if len(unit.paths) == 1:
                seen[key] += record.lines_read
        return counts

    @cached_property
    def reject_counts(self) -> dict[str, int]:
        """Reason -> documents, most frequent first."""
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record.reject_counts)
        return dict(total.most_common())

    @cached_property
    def notes(self) -> dict[str, int]:
        """Note -> how often it holds of the documents that were kept."""
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record.notes)
        return dict(total)

    def metadata_found(self) -> dict[str, Counter[str]]:
        """Source -> for each kept key the documents that have it; every source has an entry."""
        found: dict[str, Counter[str]] = {}
        for record in self.records:
            found.setdefault(record.source, Counter()).update(record.metadata_found)
        return found

    @cached_property
    def files_per_source(self) -> dict[str, int]:
        files: dict[str, set[str]] = {}
        for unit in self.units:
            files.setdefault(unit.source, set()).update(unit.paths)
        return {name: len(paths) for name, paths in files.items()}
