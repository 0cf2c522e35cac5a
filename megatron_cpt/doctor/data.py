"""The datasets of the run against their files, the model's tokenizer and the model's embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoint_convert.embedding import EMBEDDING, row_norms
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.adopt import NEAR_ZERO
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.data.datasets import check_dataset, model_fingerprint
from megatron_cpt.doctor.check import Check
from megatron_cpt.errors import CptError, DataError
from megatron_cpt.launch.origin import Origin

COUNTED_TOKENS = 64 << 20  # of each source: spread over it in windows
WINDOW_TOKENS = 1 << 20
SHOWN_TOKENS = 8


def check_data(config: RunConfig, arch: Architecture, model_dir: Path, origin: Origin | None) -> list[Check]:
    """Check every dataset of `config`, and with an `origin` the embedding rows of the ids in those that are sound."""
    named = {source.name: source.prefix for source in config.data.train}
    if not named:
        return [Check("data", "data.train", "error", "it is empty", "data: {train: [{name: domain, prefix: PREFIX}]}")]
    try:
        fingerprint = model_fingerprint(model_dir)
    except CptError as error:
        return [Check("tokenizer", str(model_dir), "error", error.message, error.hint)]
    tokenizer = _tokenizer(model_dir, fingerprint)
    checks, sound = [], []
    for name, prefix in [*named.items(), *config.data.validation.items()]:
        checks.append(_files(name, prefix, config, arch, fingerprint))
        if checks[-1].verdict == "ok" and named.get(name) == prefix:
            sound.append(prefix)
    embedding = [] if origin is None else [check_embedding(sound, model_dir, origin)]
    return [tokenizer, *checks, *embedding]


def _tokenizer(model_dir: Path, fingerprint: str | None) -> Check:
    if fingerprint is None:
        detail = "it has no tokenizer.json: only the vocabulary size of the data is compared"
        return Check("tokenizer", str(model_dir), "not checked", detail)
    return Check("tokenizer", f"{model_dir}/tokenizer.json", "ok", f"fingerprint {fingerprint[:12]}")


def _files(name: str, prefix: str, config: RunConfig, arch: Architecture, fingerprint: str | None) -> Check:
    looked_at = f"{prefix}: manifest, length of .bin against .idx, order of sequences, tokenizer, a sample of ids"
    try:
        dataset = check_dataset(name, prefix, config, arch, fingerprint)
    except CptError as error:
        return Check(f"dataset {name}", looked_at, "error", error.message, error.hint)
    return Check(f"dataset {name}", looked_at, "ok", f"{dataset.tokens:,} tokens")


def check_embedding(prefixes: list[str], model_dir: Path, origin: Origin) -> Check:
    """Check that the ids which occur in the datasets have embedding rows that were trained."""
    name, looked_at = "untrained tokens", f"embedding of {origin.weights}"
    if origin.kind == "random":
        return Check(name, "nothing", "not checked", "model.init_from is random: no row is trained yet")
    if not prefixes:
        return Check(name, "nothing", "not checked", "no dataset is sound")
    try:
        norms = row_norms(open_checkpoint(origin.weights, hf_config=model_dir).weights.tensors[EMBEDDING])
        counts, read = _count_ids(prefixes, len(norms))
    except CptError as error:
        return Check(name, looked_at, "error", error.message, error.hint)
    looked_at += f" ({len(norms):,} rows) and {read:,} tokens of {len(prefixes)} datasets"
    used = np.flatnonzero(counts)
    weak = used[norms[used] < NEAR_ZERO * float(np.median(norms))]
    if not len(weak):
        return Check(name, looked_at, "ok", f"the rows of all {len(used):,} ids that occur are far from zero")
    weak = weak[np.argsort(-counts[weak], kind="stable")]
    shown = ", ".join(_spelled(model_dir, weak[:SHOWN_TOKENS]))
    detail = f"{len(weak):,} ids that occur {int(counts[weak].sum()):,} times have rows near zero: {shown}"
    hint = (
        "these tokens were never trained and can make the first losses infinite: remove them from the text, or give "
        "their rows values first"
    )
    return Check(name, looked_at, "warning", detail, hint)


def _count_ids(prefixes: list[str], rows: int) -> tuple[Array, int]:
    """How often each id occurs, int64 [rows], and how many tokens were read.

    Raises:
        DataError: an id has no row.
    """
    counts, read = np.zeros(rows, np.int64), 0
    for prefix in prefixes:
        tokens = open_indexed(prefix).tokens
        windows = max(1, min(-(-len(tokens) // WINDOW_TOKENS), COUNTED_TOKENS // WINDOW_TOKENS))
        for start in np.linspace(0, max(0, len(tokens) - WINDOW_TOKENS), windows, dtype=np.int64):
            window = tokens[start : start + WINDOW_TOKENS]
            if len(window) and not 0 <= int(window.min()) <= int(window.max()) < rows:
                raise DataError(f"{prefix}: an id has no row among {rows:,}", hint=f"megatron-cpt verify {prefix}")
            counts += np.bincount(window, minlength=rows)
            read += len(window)
    return counts, read


def _spelled(model_dir: Path, ids: Array) -> list[str]:
    try:
        tokenizer = load_tokenizer(str(model_dir), backend="reference")
    except CptError:  # no tokenizer there, which another check says
        return [f"id {int(i)}" for i in ids]
    return [f"{tokenizer.decode([int(i)])!r} = {int(i)}" for i in ids]
