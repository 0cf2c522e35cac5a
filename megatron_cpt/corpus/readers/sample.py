"""A little of the input, read before a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cpt.corpus.documents import UnitTally
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.readers.unit import Unit


def sample_texts(units: Sequence[Unit], max_document_bytes: int, chars_per_unit: int = 1 << 14) -> list[str]:
    """Texts from four places of the corpus, for the tokenizer's self-check."""
    texts: list[str] = []
    for unit in units[:: max(1, len(units) // 4)][:4]:
        wanted_chars = chars_per_unit
        for batch in read_unit(unit, UnitTally(), max_document_bytes):
            for text in batch.texts:
                if wanted_chars > 0:
                    texts.append(text[:wanted_chars])
                    wanted_chars -= len(text)
            if wanted_chars <= 0:
                break
    return texts
