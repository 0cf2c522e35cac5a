"""Stored targets of forgetting.kl: what the base model says of the tokens that a run will read. No torch.

PREFIX.kl.ids     int32   [tokens, k]        the k likeliest next tokens, the likeliest first
PREFIX.kl.logq    float16 [tokens, k + 1]    their log-probabilities, and that of all other tokens together
PREFIX.kl.json    the record: of which base, tokenizer, dataset and order the targets are, and how many are there

They stand in the order in which the run reads the source, as the base must have seen what the model sees: the same
tokens before each. That order follows from the seed, the name of the source and the sequence length, so these are
part of the identity too. The record is written after the bytes it counts: what was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import Dataset, SourcePlan
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.launch.fisher import base_identity
from megatron_cpt.launch.identity import Identity
from megatron_cpt.launch.preflight import CheckedRun

FORMAT = 1
ID_BYTES, LOG_Q_BYTES = 4, 2


@dataclass(frozen=True)
class KlTargets:
    """The targets of one source."""

    model: dict[str, Any]  # of the base, as `launch.identity.Identity` has it
    dataset: str  # its hash
    source: str
    seed: int
    seq_length: int
    document_attention: bool
    temperature: float
    top_k: int
    tokens: int = 0  # how many are there, from the beginning of the source's stream

    def differences(self, wanted: KlTargets) -> list[str]:
        """What of `wanted`, which a run needs, is not what these are."""
        found = [str(change) for change in Identity(**self.model).differences(Identity(**wanted.model))]
        for field in dataclasses.fields(self):
            if field.name in ("model", "tokens"):
                continue
            is_now, needed = getattr(self, field.name), getattr(wanted, field.name)
            if is_now != needed:
                found.append(f"{field.name}: {is_now!r} -> {needed!r}")
        return found

    @property
    def file_bytes(self) -> dict[str, int]:
        """The least size of each file, by its ending."""
        ids = self.tokens * self.top_k * ID_BYTES
        return {"ids": ids, "logq": self.tokens * (self.top_k + 1) * LOG_Q_BYTES}


def targets_path(prefix: str, ending: str) -> Path:
    """`ending` is ids, logq or json."""
    return Path(f"{prefix}.kl.{ending}")


def counted(config: RunConfig, datasets: Iterable[Dataset]) -> list[Dataset]:
    """The sources whose tokens count in forgetting.kl, in the order of the config."""
    asked = config.forgetting.active_kl
    assert asked is not None
    return [dataset for dataset in datasets if asked.sources is None or dataset.name in asked.sources]


def wanted_targets(run: CheckedRun, dataset: Dataset, tokens: int) -> KlTargets:
    """What the targets of a source must be for this run. Of a base that is gone nothing is known."""
    config = run.config
    asked = config.forgetting.active_kl
    assert asked is not None and asked.offline_top_k is not None
    gone = run.origin.kind == "missing"
    identity = Identity({}, None, None) if gone else base_identity(config, run.origin)
    return KlTargets(
        model=dataclasses.asdict(identity),
        dataset=dataset.hash,
        source=dataset.name,
        seed=config.seed,
        seq_length=config.batch.seq_length,
        document_attention=config.model.document_attention,
        temperature=asked.temperature,
        top_k=asked.offline_top_k,
        tokens=tokens,
    )


def read_targets(prefix: str) -> KlTargets | None:
    """Return the record beside a dataset, None where there is none.

    Raises:
        DataError: it is damaged, or a file is shorter than it says.
    """
    path = targets_path(prefix, "json")
    if not path.is_file():
        return None
    hint = f"remove {prefix}.kl.* and write them again: megatron-cpt kl-targets CONFIG"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if (version := raw.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, and this version reads {FORMAT}")
        record = KlTargets(**raw)
        Identity(**record.model)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"cannot use {path}: {error}", hint=hint) from error
    for ending, size in record.file_bytes.items():
        file = targets_path(prefix, ending)
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            raise DataError(f"{file} has {found:,} bytes instead of {size:,}", hint=hint)
    return record


def write_record(prefix: str, record: KlTargets) -> None:
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(record)}, indent=1)
    write_atomically(targets_path(prefix, "json"), (text + "\n").encode())


def check_targets(run: CheckedRun, ledger: Ledger, plans: Iterable[SourcePlan]) -> None:
    """Check that the stored targets of forgetting.kl are this run's and reach to the end of its budget.

    Raises:
        ConfigError: there are none, too few, or they are of another base, tokenizer, dataset or order.
        DataError: they are damaged.
    """
    asked = run.config.forgetting.active_kl
    if asked is None or asked.offline_top_k is None:
        return
    needed = end_tokens(ledger, plans)
    for dataset in counted(run.config, run.datasets.train):
        if dataset.name not in needed:
            continue  # it is not whole, and something else has said so
        wanted = wanted_targets(run, dataset, needed[dataset.name])
        check_order(run.config, ledger, wanted)
        found = read_targets(dataset.prefix)
        path, hint = targets_path(dataset.prefix, "json"), "megatron-cpt kl-targets CONFIG writes them"
        if found is None:
            raise ConfigError(
                f"forgetting.kl.offline_top_k needs the stored targets of source {dataset.name!r}, and {path} does not "
                "exist",
                hint=hint,
            )
        if run.origin.kind == "missing":
            wanted = dataclasses.replace(wanted, model=found.model)
        if changes := found.differences(wanted):
            listed = "\n".join(f"  {change}" for change in changes)
            raise ConfigError(
                f"{path} holds targets of another run's forgetting.kl; it differs in\n{listed}",
                hint=f"{hint} anew with --overwrite; a copy of the dataset under another prefix keeps both",
            )
        if found.tokens < wanted.tokens:
            raise ConfigError(
                f"{path} holds targets of {found.tokens:,} tokens, and the budget reads {wanted.tokens:,} of source "
                f"{dataset.name!r}",
                hint="megatron-cpt kl-targets CONFIG goes on where they end",
            )


def check_order(config: RunConfig, ledger: Ledger, wanted: KlTargets) -> None:
    """Raise ConfigError when the run reads the source in pieces of another length than the targets are for."""
    lengths = {ledger.sources[wanted.source].block_tokens, *(phase.seq_length for phase in config.phases)}
    if other := lengths - {wanted.seq_length, None}:
        raise ConfigError(
            f"source {wanted.source!r} is read in pieces of {other.pop()} tokens too, and batch.seq_length is "
            f"{wanted.seq_length}: stored targets are of samples of one length, as the base must have seen the same "
            "tokens before each",
            hint="forgetting.kl.offline_top_k: null runs the base beside the model",
        )


def end_tokens(ledger: Ledger, plans: Iterable[SourcePlan]) -> Mapping[str, int]:
    """How far into its stream each source is read when the budget is trained; a step of a phase more or less."""
    return {plan.name: ledger.sources[plan.name].tokens + plan.needed_tokens for plan in plans}


def spare_tokens(config: RunConfig) -> int:
    """What is stored beyond `end_tokens`, so that it is enough however the shares are rounded."""
    return max(1, len(config.phases)) * config.batch.global_batch_size * config.batch.seq_length
