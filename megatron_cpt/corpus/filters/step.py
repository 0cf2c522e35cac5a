"""A step between reading and tokenising: a batch in, a batch out, every dropped document in the tally with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_cpt.corpus.documents import Batch, UnitTally


@dataclass(frozen=True, repr=False)
class Step:
    """A named step; `apply` changes texts or rejects documents."""

    name: str
    apply: Callable[[Batch, UnitTally], Batch]

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        return self.apply(batch, tally)

    def __repr__(self) -> str:
        return self.name
