"""Documents chosen from several pieces, as the three columns of a dataset.

The columns are token ids, sequence lengths and sequences per document. Pieces are the parts of a run or finished
datasets. A column is iterated anew for each pass and holds one piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import DocumentCounts, Encoded

Selection = tuple[Encoded, Array | None]  # a piece, and a mask of the documents to keep: all of them with None
OpenSelections = Callable[[], Iterable[Selection]]  # opens the pieces in output order


@dataclass(frozen=True)
class Column:
    """One column over all pieces."""

    selections: OpenSelections
    of_piece: Callable[[Selection], Iterator[Array]]

    def __iter__(self) -> Iterator[Array]:
        for selection in self.selections():
            yield from self.of_piece(selection)


def kept_ids(selection: Selection) -> Iterator[Array]:
    """Token ids of the kept documents: views, one per run of neighbouring documents."""
    encoded, keep = selection
    if keep is None:
        yield encoded.ids
        return
    ends = np.concatenate(([0], np.cumsum(encoded.document_tokens())))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], keep.astype(np.int8), [0]))))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield encoded.ids[ends[begin] : ends[end]]


def kept_sequence_lengths(selection: Selection) -> Iterator[Array]:
    """Tokens of each sequence of the kept documents."""
    encoded, keep = selection
    lengths = encoded.sequence_lengths
    yield lengths if keep is None else lengths[np.repeat(keep, encoded.sequences_per_document)]


def kept_sequences_per_document(selection: Selection) -> Iterator[Array]:
    """Sequences of each kept document."""
    encoded, keep = selection
    yield encoded.sequences_per_document if keep is None else encoded.sequences_per_document[keep]


def count_kept(selection: Selection) -> DocumentCounts:
    """Documents, sequences and tokens that are kept."""
    encoded, keep = selection
    if keep is None:
        return DocumentCounts(len(encoded.sequences_per_document), len(encoded.sequence_lengths), len(encoded.ids))
    return DocumentCounts(
        int(keep.sum()),
        int(encoded.sequences_per_document[keep].sum()),
        int(encoded.document_tokens()[keep].sum()),
    )
