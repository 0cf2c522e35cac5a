"""The datasets a config names, checked before anything starts; numpy only, no torch.

`check_datasets` finds every fault that costs no pass over the data: manifests, sizes, headers, the tokenizer,
the vocabulary, a sample of ids. `plan_sources` says how many tokens of each source the budget needs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.phases import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest, manifest_hash, read_manifest
from megatron_cpt.corpus.dataset.soundness import foreign_id, index_checks, refuse_damage
from megatron_cpt.corpus.dataset.text_rules import difference, text_rules
from megatron_cpt.corpus.tokenizers.load import tokenizer_fingerprint
from megatron_cpt.data.blend import Blend
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

_SAMPLED_TOKENS = 1 << 16  # ids looked at per dataset: its start, its end, and windows in between

_SAMPLED_DOCUMENTS = 1 << 12  # per dataset, whose ends are looked at


@dataclass(frozen=True)
class Dataset:
    """One checked dataset of the config."""

    name: str
    prefix: str
    hash: str  # changes with the content; the key of index caches
    tokens: int
    eod_id: int
    vocab_size: int  # of the tokenizer


@dataclass(frozen=True)
class Datasets:
    train: tuple[Dataset, ...]
    validation: tuple[Dataset, ...]

    def manifests(self) -> dict[str, str]:
        return {dataset.name: dataset.hash for dataset in self.train}


@dataclass(frozen=True)
class SourcePlan:
    """What the rest of the budget takes from one source. Epochs count from the beginning of the source."""

    name: str
    available_tokens: int  # of one epoch
    needed_tokens: int  # from here to the end of the budget
    epochs_done: float
    epochs_at_end: float


def check_datasets(config: RunConfig, arch: Architecture, model_dir: Path) -> Datasets:
    """Every dataset of `config`, checked against the model in `model_dir`.

    Raises:
        DataError: the first fault found, with the dataset's name.
    """
    fingerprint = model_fingerprint(model_dir)
    train = tuple(check_dataset(s.name, s.prefix, config, arch, fingerprint) for s in config.data.train)
    validation = tuple(check_dataset(name, p, config, arch, fingerprint) for name, p in config.data.validation.items())
    datasets = Datasets(train, validation)
    check_together(config, datasets)
    return datasets


def check_together(config: RunConfig, datasets: Datasets) -> None:
    """Check the lengths of datasets that are sound alone, and warn where two of them do not go together.

    Raises:
        DataError: there is nothing to train on, or a dataset is too short to train on or to predict anything.
    """
    if not config.data.train:
        raise DataError(
            "data.train is empty: there is nothing to train on",
            hint="name a dataset: data: {train: [{name: domain, prefix: data/domain}]}",
        )
    train, validation = datasets.train, datasets.validation
    _warn_of_differences((*train, *validation))
    for dataset in train:
        if dataset.tokens <= config.batch.seq_length:
            raise DataError(
                f"source {dataset.name!r} has {dataset.tokens:,} tokens, fewer than one sample of "
                f"{config.batch.seq_length} + 1",
                hint="use more text, or a smaller batch.seq_length",
            )
    for dataset in validation:
        if dataset.tokens < 2:
            raise DataError(
                f"validation set {dataset.name!r} has {dataset.tokens} tokens: nothing to predict",
                hint="hold out more documents",
            )
    sources = {dataset.hash: dataset.name for dataset in train}
    for dataset in validation:
        if dataset.hash in sources:
            logger.warning(
                "validation set %r has the same text as the training source %r: its loss says nothing about new text",
                dataset.name,
                sources[dataset.hash],
            )


def model_fingerprint(model_dir: Path) -> str | None:
    """Return the fingerprint of the model's tokenizer.json, None where there is none."""
    if (model_dir / "tokenizer.json").is_file():
        return tokenizer_fingerprint(model_dir)
    logger.warning("%s has no tokenizer.json: only the vocabulary size of the data is checked", model_dir)
    return None


def _warn_of_differences(datasets: Sequence[Dataset]) -> None:
    """Say where two datasets of a run were not written by the same rules, which nothing later shows."""
    if not datasets:
        return
    first, known = datasets[0], read_manifest(datasets[0].prefix)
    for dataset in datasets[1:]:
        manifest = read_manifest(dataset.prefix)
        found = difference(text_rules(manifest), text_rules(known))
        if manifest.append_eod != known.append_eod:
            ends = {True: "ends documents with EOD", False: "does not end them so"}
            found = f"the first {ends[manifest.append_eod]}, the second {ends[known.append_eod]}"
        elif manifest.append_eod and dataset.eod_id != first.eod_id:
            found = f"EOD: {manifest.tokenizer.eod_token!r} against {known.tokenizer.eod_token!r}"
        if found:
            logger.warning("datasets %r and %r were not written by the same rules: %s", dataset.name, first.name, found)


def check_dataset(name: str, prefix: str, config: RunConfig, arch: Architecture, fingerprint: str | None) -> Dataset:
    """Return one dataset, checked against the model and the tokenizer `fingerprint`, None where it is unknown.

    Raises:
        DataError: a file is missing or has another length than .idx says, another tokenizer wrote it, or an id is
            outside the vocabulary, or documents are to be kept apart and some do not end with their EOD.
    """
    manifest = read_manifest(prefix)
    if config.model.document_attention and not manifest.append_eod:
        raise DataError(
            f"model.document_attention keeps documents apart by their EOD, and those of {name!r} have none",
            hint="preprocess the text again with --append-eod, or set model.document_attention: false",
        )
    _check_tokenizer(name, manifest, arch, fingerprint)
    _check_ids(name, prefix, manifest)
    if config.model.document_attention:
        _check_document_ends(name, prefix, manifest)
    return Dataset(
        name,
        prefix,
        manifest_hash(manifest),
        manifest.token_count,
        manifest.tokenizer.eod_id,
        manifest.tokenizer.vocab_size,
    )


def _check_tokenizer(name: str, manifest: Manifest, arch: Architecture, fingerprint: str | None) -> None:
    tokenizer = manifest.tokenizer
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"dataset {name!r} was written with the tokenizer {tokenizer.name} ({tokenizer.fingerprint[:12]}), which "
            f"is not the model's ({fingerprint[:12]})",
            hint="preprocess the text again with --tokenizer set to the model's directory",
        )
    if tokenizer.vocab_size > arch.vocab_size:
        raise DataError(
            f"dataset {name!r} has ids up to {tokenizer.vocab_size - 1:,}, the model only {arch.vocab_size:,} rows",
            hint="preprocess the text again with --tokenizer set to the model's directory",
        )


def _check_ids(name: str, prefix: str, manifest: Manifest) -> None:
    """The index agrees with the manifest and with .bin, and a sample of ids lies inside the vocabulary."""
    reader = open_indexed(prefix)
    refuse_damage(f"dataset {name!r} ({prefix})", index_checks(manifest, reader))
    for start in np.linspace(0, max(0, reader.token_count - 4096), _SAMPLED_TOKENS // 4096, dtype=np.int64):
        window = reader.tokens[start : start + 4096]
        if foreign_id(window, manifest.tokenizer.vocab_size) is not None:
            raise DataError(
                f"dataset {name!r}: an id between tokens {start:,} and {start + 4096:,} is outside the vocabulary of "
                f"{manifest.tokenizer.vocab_size:,}",
                hint=f"megatron-cpt verify {prefix}",
            )


def _check_document_ends(name: str, prefix: str, manifest: Manifest) -> None:
    """Documents over the whole dataset end with the EOD that the manifest says, or attention would cross them."""
    reader, eod_id = open_indexed(prefix), manifest.tokenizer.eod_id
    count = min(reader.document_count, _SAMPLED_DOCUMENTS)
    for index in np.linspace(0, reader.document_count - 1, count, dtype=np.int64):
        ids = reader.document(int(index))
        if len(ids) and ids[-1] != eod_id:
            raise DataError(
                f"model.document_attention keeps documents apart by their EOD, {manifest.tokenizer.eod_token!r} = "
                f"{eod_id}, and document {index:,} of {name!r} ends with {ids[-1]}",
                hint=f"megatron-cpt verify {prefix} counts them; preprocess the text again, or set "
                "model.document_attention: false",
            )


def needed_tokens(config: RunConfig, ledger: Ledger) -> dict[str, int]:
    """Return the tokens that each source gives from `ledger` to the end of the budget, to within a step a phase."""
    needed = dict.fromkeys((source.name for source in config.data.train), 0)
    end, standing = config.steps(ledger.tokens).train_tokens, ledger
    while standing.tokens < config.budget.train_tokens:
        phase = phase_at(config, standing.tokens)
        # A phase is taken to begin where the budgets before it end, and the last to end where the run's last step does.
        until = end if phase.end_tokens >= config.budget.train_tokens else phase.end_tokens
        for name, due in Blend(phase.mix).due_tokens(standing, until).items():
            needed[name] += max(0, round(due / phase.seq_length)) * phase.seq_length
        standing = replace(standing, tokens=until, blend=None)  # from here on nothing is given yet
    return needed


def plan_sources(config: RunConfig, datasets: Datasets, ledger: Ledger) -> tuple[SourcePlan, ...]:
    """What each source must give from `ledger` to the end of the budget.

    Raises:
        DataError: a source would be repeated more often than data.max_epochs allows.
    """
    needed_by_source = needed_tokens(config, ledger)
    plans = []
    for dataset in datasets.train:
        position = ledger.sources[dataset.name]
        block = position.block_tokens
        available = (dataset.tokens - 1) // block * block  # whole blocks; the tail differs in each epoch
        needed = needed_by_source[dataset.name]
        plans.append(
            SourcePlan(
                dataset.name,
                available,
                needed,
                position.tokens / available,
                (position.tokens + needed) / available,
            )
        )
    _refuse_repeats(config, plans)
    return tuple(plans)


def _refuse_repeats(config: RunConfig, plans: Sequence[SourcePlan]) -> None:
    allowed = {source.name: source.max_epochs or config.data.max_epochs for source in config.data.train}
    repeated = [plan for plan in plans if plan.epochs_at_end > allowed[plan.name]]
    if not repeated:
        return
    listed = ", ".join(f"{p.name} {p.epochs_at_end:.2f} times, max_epochs allows {allowed[p.name]:g}" for p in repeated)
    worst = max(plan.epochs_at_end for plan in repeated)
    own = any(source.max_epochs is not None for source in config.data.train if source.name == repeated[0].name)
    key = f"max_epochs of the source {repeated[0].name}" if own else f"data.max_epochs={worst:.2f}"
    raise DataError(
        f"the budget would read {listed}",
        hint=f"lower budget.train_tokens or the share of the source, add data, or set {key}",
    )
