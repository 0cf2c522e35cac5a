"""C4's rules for whole pages (Raffel et al. 2020, section 2.2); its word list is a filter of its own, `bad_words`."""

from __future__ import annotations

from megatron_cpt.corpus.documents import Batch, UnitTally

_MIN_SENTENCES = 5


def c4_pages(batch: Batch, tally: UnitTally) -> Batch:
    """Reject pages with `lorem ipsum`, with a curly bracket, or with fewer than five sentences."""
    batch = tally.reject_where(batch, ["lorem ipsum" not in t.lower() for t in batch.texts], "c4_lorem_ipsum")
    batch = tally.reject_where(batch, ["{" not in text for text in batch.texts], "c4_curly_bracket")
    enough = [sum(map(text.count, ".!?。！？")) >= _MIN_SENTENCES for text in batch.texts]
    return tally.reject_where(batch, enough, "c4_few_sentences")
