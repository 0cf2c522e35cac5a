"""Documents to token ids, by the corpus's rules for chunks, the end of document and special tokens in the text."""

from __future__ import annotations

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.documents import UNKNOWN_TOKENS, WITH_UNKNOWN_TOKENS, Batch, Encoded, UnitTally
from megatron_cpt.corpus.filters.chunking import chunk_texts, chunk_tokens
from megatron_cpt.corpus.run.corpus_run import CorpusRun
from megatron_cpt.corpus.tokenizers.tokenizer import Ids, Lengths


def encode_documents(run: CorpusRun, batch: Batch, tally: UnitTally) -> tuple[Batch, Encoded]:
    """Token ids of a batch by the corpus's chunking, EOD and special-token rules."""
    tokenizer, chunking = run.tokenizer, run.corpus.chunking
    pieces, per_document = batch.texts, np.ones(len(batch), np.int64)
    if chunking.mode in ("characters", "sentences"):
        pieces, per_document = chunk_texts(batch.texts, chunking.mode, chunking.size, chunking.overlap)
    ids, lengths = tokenizer.encode_batch(pieces)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise AssertionError(f"{tokenizer.backend} gave an id outside 0..{tokenizer.vocab_size - 1}")
    if run.corpus.append_eod and not tokenizer.ends_with_eod:
        ids, lengths = append_eod(ids, lengths, per_document, tokenizer.eod_id)
    if chunking.mode == "tokens":
        ids, lengths, per_document = chunk_tokens(ids, lengths, chunking.size, chunking.overlap)
    filled = lengths > 0  # a document without tokens has no sequence (Megatron's convention)
    if not filled.all():
        owner = np.repeat(np.arange(len(batch)), per_document)
        per_document = np.bincount(owner[filled], minlength=len(batch))
        lengths = lengths[filled]
    batch, encoded = _check_special(run, batch, tally, Encoded(ids, lengths, per_document))
    if tokenizer.unknown_id is not None:
        _count_unknown(tally, encoded, tokenizer.unknown_id)
    return batch, encoded


def _count_unknown(tally: UnitTally, encoded: Encoded, unknown_id: int) -> None:
    """Note the tokens that stand for text which the vocabulary cannot say: what it was is lost."""
    unknown = encoded.ids == unknown_id
    if unknown.any():
        tokens = encoded.document_tokens()
        owners = np.repeat(np.arange(len(tokens)), tokens)[unknown]
        tally.notes[UNKNOWN_TOKENS] += len(owners)
        tally.notes[WITH_UNKNOWN_TOKENS] += len(np.unique(owners))


def append_eod(ids: Ids, lengths: Lengths, per_document: Array, eod_id: int) -> tuple[Ids, Lengths]:
    """End every document that has tokens with `eod_id`, on its last piece, in one pass over the flat ids."""
    last = np.cumsum(per_document) - 1
    tokens = np.concatenate(([0], np.cumsum(lengths)))
    filled = tokens[last + 1] > tokens[last + 1 - per_document]
    longer = lengths.copy()
    longer[last[filled]] += 1
    ends = (np.cumsum(longer) - 1)[last[filled]]
    out = np.empty(int(longer.sum()), np.int32)
    is_text = np.ones(len(out), bool)
    is_text[ends] = False
    out[is_text] = ids
    out[ends] = eod_id
    return out, longer


def _check_special(run: CorpusRun, batch: Batch, tally: UnitTally, encoded: Encoded) -> tuple[Batch, Encoded]:
    """Reject documents that hold what is not theirs: the EOD before their end, or any special token on `reject`.

    The EOD can come out of plain text where it is a token of the model's vocabulary like any other.
    """
    tokenizer, mode = run.tokenizer, run.corpus.special_tokens_in_text
    if mode == "parse":
        return batch, encoded
    special = (
        np.isin(encoded.ids, np.array(sorted(tokenizer.special_ids), np.int32))
        if mode == "reject"
        else encoded.ids == tokenizer.eod_id
    )
    document_tokens = encoded.document_tokens()
    allowed = (document_tokens > 0) & run.has_eod
    if int(special.sum()) == int(allowed.sum()):  # each filled document ends with one
        return batch, encoded
    found = np.bincount(np.repeat(np.arange(len(batch)), document_tokens)[special], minlength=len(batch))
    reason = "special_token_in_text" if mode == "reject" else "end_of_document_in_text"
    wanted = found <= allowed
    return tally.reject_where(batch, wanted.tolist(), reason), encoded.select(wanted)
