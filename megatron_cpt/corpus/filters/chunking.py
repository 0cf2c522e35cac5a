"""Documents cut into sequences. A document stays one document; each chunk is one sequence of it.

    documents   whole (default): training packs them
    tokens      windows of `size` tokens
    characters  windows of `size` characters
    sentences   as many whole sentences as fit `size` characters; a longer sentence is cut

`overlap` repeats that much of the end of a window at the start of the next (tokens and characters). EOD ends the
document, so only its last chunk has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_cpt.corpus.arrays import Array

# After a full stop, question or exclamation mark and white space, or after its CJK form, or at a line's end.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]»”’]*\s+|(?<=[。！？])[」』”’]*|\n+")


def window_starts(length: int, size: int, overlap: int) -> range:
    """Starts of windows that cover `length`: the last one begins where the end first comes into reach."""
    if length <= size:
        return range(1)
    step = size - overlap
    return range(0, -(-(length - size) // step) * step + 1, step)


def character_windows(text: str, size: int, overlap: int) -> list[str]:
    return [text[start : start + size] for start in window_starts(len(text), size, overlap)]


def sentence_groups(text: str, size: int) -> list[str]:
    """Chunks of whole sentences, at most `size` characters each; joined they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() < len(text)] + [len(text)]
    chunks, start, last = [], 0, 0
    for end in ends:
        if end - start > size and last > start:
            chunks.append(text[start:last])
            start = last
        while end - start > size:
            chunks.append(text[start : start + size])
            start += size
        last = end
    if start < len(text) or not chunks:
        chunks.append(text[start:])
    return chunks


def chunk_texts(texts: Sequence[str], mode: str, size: int, overlap: int) -> tuple[list[str], Array]:
    """(all chunks in order, chunks per document) for the modes that cut text."""
    if mode == "characters":
        groups = [character_windows(text, size, overlap) for text in texts]
    else:
        groups = [sentence_groups(text, size) for text in texts]
    return [chunk for group in groups for chunk in group], np.array([len(g) for g in groups], np.int64)


def chunk_tokens(ids: Array, lengths: Array, size: int, overlap: int) -> tuple[Array, Array, Array]:
    """Windows over flat ids: (ids, sequence lengths, sequences per document). Empty documents have none."""
    starts, sizes, counts = [], [], []
    begin = 0
    for length in lengths.tolist():
        windows = list(window_starts(length, size, overlap)) if length else []
        starts += [begin + start for start in windows]
        sizes += [min(size, length - start) for start in windows]
        counts.append(len(windows))
        begin += length
    sequence_lengths = np.array(sizes, np.int64)
    if overlap:
        shift = np.array(starts, np.int64) - (np.cumsum(sequence_lengths) - sequence_lengths)
        ids = ids[np.arange(int(sequence_lengths.sum())) + np.repeat(shift, sequence_lengths)]
    return ids, sequence_lengths, np.array(counts, np.int64)
