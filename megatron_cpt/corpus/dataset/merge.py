"""Several datasets joined into one: documents in the order given, one manifest over all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_cpt import __version__
from megatron_cpt.corpus.dataset.manifest import Manifest, SourceRecord, manifest_hash
from megatron_cpt.corpus.dataset.soundness import open_proven
from megatron_cpt.corpus.dataset.text_rules import TextRules, common_rules, difference, text_rules
from megatron_cpt.corpus.dataset.writer import refuse_existing, write_files
from megatron_cpt.corpus.staging import staging_folder, write_errors_told
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)


def merge_datasets(prefixes: Sequence[str], output_prefix: str, *, overwrite: bool = False) -> Manifest:
    """Join datasets of one tokenizer into `output_prefix`. Raises DataError when they do not fit together."""
    if len(prefixes) < 2:
        raise DataError("merge needs at least two datasets", hint="megatron-cpt merge A B --output-prefix C")
    manifests, readers = open_proven(prefixes)
    check_same_tokenizer(prefixes, manifests)
    _tell_of_repeats(prefixes, manifests)
    first = manifests[0]
    refuse_existing(output_prefix, overwrite)
    template = replace(
        first,
        tool_version=__version__,
        document_count=sum(m.document_count for m in manifests),
        sequence_count=sum(m.sequence_count for m in manifests),
        token_count=sum(m.token_count for m in manifests),
        input_bytes=sum(m.input_bytes for m in manifests),
        sources=_merged_sources(manifests),
        rejects=dict(sum((Counter(m.rejects) for m in manifests), Counter[str]())),
        config={
            "merged": [{"prefix": p, "bin_sha256": m.bin_sha256} for p, m in zip(prefixes, manifests, strict=True)],
            "text_rules": common_rules(manifests),
        },
    )
    with write_errors_told(output_prefix), staging_folder(output_prefix, "merge") as staging:
        return write_files(
            staging, "merged", output_prefix, template, lambda: ((reader.encoded(), None) for reader in readers)
        )


def _tell_of_repeats(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    known: dict[str, str] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        content = manifest_hash(manifest)
        if other := known.get(content):
            log.warning("%s has the same documents as %s: the joined dataset will hold them twice", prefix, other)
        known.setdefault(content, prefix)


def check_same_tokenizer(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise DataError when ids of one dataset would mean something else in another."""

    def identity(manifest: Manifest) -> tuple[str, int, str, bool]:
        tokenizer = manifest.tokenizer
        return tokenizer.fingerprint, tokenizer.eod_id, manifest.dtype, manifest.append_eod

    kinds: dict[TextRules, str] = {}  # one dataset of each kind met so far: a few, however many datasets there are
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if identity(manifest) != identity(manifests[0]):
            raise DataError(
                f"{prefix} and {prefixes[0]} differ in tokenizer, EOD or dtype: one dataset cannot hold both",
                hint="preprocess both with the same tokenizer and the same --append-eod",
            )
        rules = text_rules(manifest)
        for known, other in kinds.items():
            if found := difference(rules, known):
                raise DataError(
                    f"{prefix} and {other} differ in how text became ids ({found}): one dataset cannot hold both",
                    hint="preprocess both with the same special_tokens_in_text and post_processor",
                )
        kinds.setdefault(rules, prefix)


def _merged_sources(manifests: Sequence[Manifest]) -> tuple[SourceRecord, ...]:
    total = sum(manifest.token_count for manifest in manifests)
    files, documents, tokens = Counter[str](), Counter[str](), Counter[str]()
    for source in (source for manifest in manifests for source in manifest.sources):
        files[source.name] += source.files
        documents[source.name] += source.documents
        tokens[source.name] += source.tokens
    return tuple(
        SourceRecord(name, files[name], documents[name], tokens[name], round(tokens[name] / max(total, 1), 6))
        for name in files
    )
