"""A manifest for a dataset of another tool: what its bytes prove is checked, what they cannot tell is said.

Megatron-LM writes PREFIX.bin and PREFIX.idx alone. `adopt_dataset` reads them once, against the tokenizer that is
said to have written them, and writes PREFIX.manifest.json beside them; the bytes stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt import __version__
from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.indexed import IndexedReader, open_indexed
from megatron_cpt.corpus.dataset.manifest import (
    ITEM_BYTES,
    Manifest,
    SourceRecord,
    bin_path,
    idx_path,
    manifest_path,
    write_manifest,
)
from megatron_cpt.corpus.dataset.soundness import (
    TOKENS_PER_BLOCK,
    document_problems,
    foreign_id,
    not_sound,
    offset_problems,
)
from megatron_cpt.corpus.dataset.text_rules import TextRules
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer
from megatron_cpt.errors import DataError

SAMPLED_DOCUMENTS = 32
SAMPLED_TOKENS = 2000  # of a document
UNSURE_TOKENS = 8  # at the end of a cut sample, where the text that is missing could change them
MIN_AGREEMENT = 0.5  # of the sampled documents; those of another tokenizer hardly ever come out the same
LEGACY_TOKENS = 7  # <CLS> <SEP> <EOD> <MASK> <PAD> <BOS> <EOS>, as far as a model lacks them
NEAR_ZERO = 0.01  # of the median norm of an embedding row

EmbeddingNorms = Callable[[], Array]  # float32 [rows]: the norm of each row of the model's embedding


@dataclass(frozen=True)
class Adoption:
    """What was found on the way to a manifest, in sentences."""

    manifest: Manifest
    proven: tuple[str, ...]
    unknown: tuple[str, ...]
    samples: tuple[str, ...]  # starts of documents, decoded


@dataclass(frozen=True)
class _Content:
    """One pass over the .bin."""

    sha256: str
    counts: Array  # int64 [vocabulary]: how often each id occurs


def adopt_dataset(
    prefix: str, tokenizer_path: str, eod_token: str | None = None, embedding_norms: EmbeddingNorms | None = None
) -> Adoption:
    """Prove the dataset at `prefix` and write its manifest.

    Args:
        prefix: PREFIX of PREFIX.bin and PREFIX.idx.
        tokenizer_path: the tokenizer that wrote it.
        eod_token: the token that ends documents, where it is not the tokenizer's own.
        embedding_norms: of the model that is to be trained, to find ids that it never learned.

    Raises:
        DataError: there is a manifest already, or the bytes are not a dataset of this tokenizer.
    """
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    reader = _open(prefix)
    tokenizer = load_tokenizer(tokenizer_path, eod_token=eod_token, special_tokens_in_text="parse", backend="reference")
    content = _read(prefix, reader, tokenizer)
    proven = [
        f"{reader.document_count:,} documents in {reader.sequence_count:,} sequences cover all {reader.token_count:,} "
        "tokens without gap or overlap",
        f"all ids lie below the vocabulary size {tokenizer.vocab_size:,}; the largest is "
        f"{int(np.flatnonzero(content.counts)[-1]):,}",
    ]
    has_eod = _ends_with_eod(prefix, reader, tokenizer, content)
    proven.append(f"{'every' if has_eod else 'no'} document ends with EOD {tokenizer.eod_token!r} = {tokenizer.eod_id}")
    rules = _rules(reader, tokenizer, content, has_eod)
    proven += _rule_sentences(rules, tokenizer)
    proven.append(_retokenised(prefix, reader, tokenizer, rules, has_eod))
    if embedding_norms is not None:
        proven.append(_learned(prefix, embedding_norms(), content, tokenizer))
    manifest = _manifest(prefix, reader, tokenizer, content, has_eod, rules)
    try:
        write_manifest(prefix, manifest)
    except OSError as error:
        raise DataError(
            f"cannot write {manifest_path(prefix)}: {error.strerror}", hint="adopt a copy, or a link in another folder"
        ) from error
    return Adoption(manifest, tuple(proven), tuple(_unknown(rules)), _samples(reader, tokenizer))


def _open(prefix: str) -> IndexedReader:
    if manifest_path(prefix).exists():
        raise DataError(f"{prefix} has a manifest already", hint=f"megatron-cpt verify {prefix}")
    if Path(f"{prefix}.partial").exists():
        raise DataError(
            f"{prefix}: the dataset is half-written ({prefix}.partial exists)",
            hint="run the same preprocess command again; it continues where it stopped",
        )
    reader = open_indexed(prefix)
    if reader.dtype not in ITEM_BYTES:
        raise DataError(
            f"{prefix}.idx says that ids are stored as {reader.dtype}; {' and '.join(ITEM_BYTES)} are supported",
            hint="write the dataset again with a tool that chooses the type by the vocabulary, as Megatron-LM's does",
        )
    if problems := [*offset_problems(reader), *document_problems(reader)]:
        raise DataError(
            not_sound(prefix, problems).message,
            hint="copy both files again; if the tool wrote them so, write them with Megatron-LM's: no sequence without "
            "tokens, and each document ended",
        )
    if not reader.token_count:
        raise DataError(f"{prefix} holds no tokens", hint="give a dataset with documents")
    return reader


def _read(prefix: str, reader: IndexedReader, tokenizer: CorpusTokenizer) -> _Content:
    digest, counts = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, reader.token_count, TOKENS_PER_BLOCK):
        block = reader.tokens[start : start + TOKENS_PER_BLOCK]
        if (wrong := foreign_id(block, tokenizer.vocab_size)) is not None:
            raise DataError(
                f"{prefix}: the id {wrong:,} near token {start:,} is outside the vocabulary of "
                f"{tokenizer.vocab_size:,} of the tokenizer {tokenizer.name}",
                hint=_foreign_id_hint(wrong, tokenizer),
            )
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
    return _Content(digest.hexdigest(), counts)


def _foreign_id_hint(wrong: int, tokenizer: CorpusTokenizer) -> str:
    hint = "give the tokenizer that wrote the dataset"
    if tokenizer.kind == "sentencepiece" and 0 <= wrong - tokenizer.vocab_size < LEGACY_TOKENS:
        hint += "; Megatron-LM's --legacy-tokenizer appends <EOD> and others to the pieces: preprocess without it"
    return hint


def _edges(reader: IndexedReader) -> tuple[Array, Array]:
    """First and last id of every document that has tokens."""
    filled = np.diff(reader.document_indices) > 0
    first, last = reader.document_indices[:-1][filled], reader.document_indices[1:][filled] - 1
    starts = reader.sequence_pointers[first] // reader.tokens.itemsize
    ends = reader.sequence_pointers[last] // reader.tokens.itemsize + reader.sequence_lengths[last] - 1
    return reader.tokens[starts], reader.tokens[ends]


def _ends_with_eod(prefix: str, reader: IndexedReader, tokenizer: CorpusTokenizer, content: _Content) -> bool:
    """Whether every document ends with the EOD; an error where some do, or where all end with another such token."""
    ends = _edges(reader)[1]
    with_eod = int((ends == tokenizer.eod_id).sum())
    if with_eod == len(ends):
        return True
    if with_eod:
        raise DataError(
            f"{prefix}: {len(ends) - with_eod:,} of {len(ends):,} documents do not end with EOD "
            f"{tokenizer.eod_token!r} = {tokenizer.eod_id}, the others do",
            hint="if another token ends them all, state it with --eod-token; else write the dataset again",
        )
    other = int(ends[0])
    stands_only_there = int(content.counts[other]) == len(ends)
    if (ends == other).all() and (other in tokenizer.special_ids or (stands_only_there and len(ends) > 1)):
        token = tokenizer.decode([other])
        raise DataError(
            f"{prefix}: every document ends with {token!r} = {other}, not with EOD {tokenizer.eod_token!r}",
            hint=f"--eod-token {token!r}",
        )
    return False


def _rules(reader: IndexedReader, tokenizer: CorpusTokenizer, content: _Content, has_eod: bool) -> TextRules:
    """What the ids tell of how text became them."""
    firsts, ends = _edges(reader)
    first = int(firsts[0])
    prefix_ids: tuple[int, ...] | None = None
    if first in tokenizer.special_ids and (firsts == first).all() and not (has_eod and first == tokenizer.eod_id):
        prefix_ids = (first,)
    elif not np.isin(firsts, sorted(tokenizer.special_ids)).any():
        prefix_ids = ()
    special = int(content.counts[sorted(tokenizer.special_ids)].sum())
    expected = len(ends) * (has_eod + bool(prefix_ids))
    return TextRules("parse" if special > expected else None, prefix_ids, () if has_eod else None)


def _rule_sentences(rules: TextRules, tokenizer: CorpusTokenizer) -> list[str]:
    found = []
    if rules.prefix_ids:
        found.append(f"every document begins with {tokenizer.decode(rules.prefix_ids)!r} = {rules.prefix_ids[0]}")
    if rules.special_tokens_in_text == "parse":
        found.append("special tokens stand inside of documents: those spelled in the text became ids")
    return found


def _retokenised(
    prefix: str, reader: IndexedReader, tokenizer: CorpusTokenizer, rules: TextRules, has_eod: bool
) -> str:
    """Decode a sample of documents and encode them again: only the tokenizer that wrote them gives the same ids."""
    filled = np.flatnonzero(np.diff(reader.document_indices) > 0)
    chosen = filled[:: max(1, len(filled) // SAMPLED_DOCUMENTS)]
    same = sum(_comes_out_the_same(reader.document(int(i)), tokenizer, rules, has_eod) for i in chosen)
    if same < MIN_AGREEMENT * len(chosen):
        raise DataError(
            f"{prefix}: of {len(chosen)} documents, decoded and tokenised again by {tokenizer.name}, {same} come out "
            "as the same ids: another tokenizer wrote them",
            hint="give the tokenizer that wrote the dataset",
        )
    return f"{same} of {len(chosen)} sampled documents, decoded and tokenised again, come out as the same ids"


def _comes_out_the_same(ids: Array, tokenizer: CorpusTokenizer, rules: TextRules, has_eod: bool) -> bool:
    text_ids = ids[len(rules.prefix_ids or ()) : len(ids) - has_eod]
    sample = text_ids[:SAMPLED_TOKENS].tolist()
    again = tokenizer.encode_batch([tokenizer.decode(sample)])[0].tolist() if sample else []
    if len(text_ids) <= SAMPLED_TOKENS:
        return bool(again == sample)
    sure = len(sample) - UNSURE_TOKENS
    return bool(again[:sure] == sample[:sure])


def _learned(prefix: str, norms: Array, content: _Content, tokenizer: CorpusTokenizer) -> str:
    """Whether the model has learned rows for the ids that occur; near-zero rows are those that it never saw."""
    used = np.flatnonzero(content.counts)
    if used[-1] >= len(norms):
        raise DataError(
            f"{prefix}: the id {int(used[-1]):,} occurs, and the model's embedding has {len(norms):,} rows",
            hint="give the model whose tokenizer wrote the dataset",
        )
    weak = used[norms[used] < NEAR_ZERO * float(np.median(norms))]
    if not len(weak):
        return f"the {len(used):,} ids that occur all have embedding rows far from zero"
    shown = ", ".join(f"{tokenizer.decode([int(i)])!r} = {int(i)}" for i in weak[:5])
    return (
        f"{len(weak):,} of the {len(used):,} ids that occur have embedding rows near zero, which the model never "
        f"learned: {int(content.counts[weak].sum()):,} tokens ({shown})"
    )


def _unknown(rules: TextRules) -> list[str]:
    found = [
        "where the text came from, how it was cleaned, and what was dropped",
        "whether the tokenizer had been changed in a way that the sampled documents do not show",
    ]
    if rules.special_tokens_in_text is None:
        found.append("whether special tokens spelled in the text would have become ids: none are in it")
    if rules.prefix_ids is None:
        found.append("whether a token was put before every text: some documents begin with a special token")
    return found


def _samples(reader: IndexedReader, tokenizer: CorpusTokenizer, count: int = 3) -> tuple[str, ...]:
    filled = np.flatnonzero(np.diff(reader.document_indices) > 0)
    chosen = filled[:: max(1, len(filled) // count)][:count]
    return tuple(tokenizer.decode(reader.document(int(i))[:64].tolist()) for i in chosen)


def _manifest(
    prefix: str,
    reader: IndexedReader,
    tokenizer: CorpusTokenizer,
    content: _Content,
    has_eod: bool,
    rules: TextRules,
) -> Manifest:
    with idx_path(prefix).open("rb") as file:
        idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    source = SourceRecord(Path(prefix).name, 1, reader.document_count, reader.token_count, 1.0)
    return Manifest(
        tool_version=__version__,
        complete=True,
        dtype=reader.dtype,
        document_count=reader.document_count,
        sequence_count=reader.sequence_count,
        token_count=reader.token_count,
        input_bytes=0,  # of the raw text, which nobody knows
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_sha256=content.sha256,
        idx_sha256=idx_sha256,
        tokenizer=tokenizer.record(),
        append_eod=has_eod,
        sources=(source,),
        config={"adopted": True, "text_rules": rules.to_json()},
    )
