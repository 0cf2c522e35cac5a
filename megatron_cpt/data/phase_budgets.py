"""Budgets of phases that are stated in epochs of a source, as tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from megatron_cpt.config.phases import mix_of_phase
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.phase import PhaseConfig
from megatron_cpt.corpus.dataset.manifest import manifest_path, read_manifest
from megatron_cpt.errors import ConfigError


def with_token_budgets(config: RunConfig) -> RunConfig:
    """Return `config` with every phase's budget in tokens, as far as the datasets are here, and their sum.

    Raises:
        ConfigError: a phase counts the epochs of a source that it does not read, or whose share changes within it.
        DataError: the dataset's manifest cannot be read.
    """
    if not any(phase.epochs for phase in config.phases):
        return config
    phases = tuple(_in_tokens(config, number, phase) for number, phase in enumerate(config.phases))
    return config.model_copy(update={"phases": phases}).with_phase_sum()


def _in_tokens(config: RunConfig, number: int, phase: PhaseConfig) -> PhaseConfig:
    if phase.epochs is None or phase.train_tokens is not None:
        return phase
    name, path = phase.epochs.source, f"phases.{number}.epochs.source"
    source = next((source for source in config.data.train if source.name == name), None)
    if source is None:
        names = ", ".join(source.name for source in config.data.train)
        raise ConfigError(f"{path} = {name!r}: no source of data.train has this name", hint=f"one of {names}")
    mix = mix_of_phase(config, phase.data, 0)
    share = mix[0].first[name]
    if any(piece.first[name] != share or piece.last[name] != share for piece in mix) or not share:
        raise ConfigError(
            f"{path} = {name!r}: its share is {'0' if not share else 'not constant'} in phase {phase.name!r}, so that "
            "its epochs say no number of tokens",
            hint="give the source a constant share, or the phase train_tokens",
        )
    if not Path(manifest_path(source.prefix)).exists():
        return phase  # `derive` says that the budget is not known here
    block, batch = config.batch.seq_length, config.phase_batch(phase)
    available = (read_manifest(source.prefix).token_count - 1) // block * block
    tokens = math.ceil(Fraction(str(phase.epochs.count)) * available / share)
    step_tokens = batch.global_batch_size * batch.seq_length
    return phase.model_copy(update={"train_tokens": -(-tokens // step_tokens) * step_tokens, "epochs": None})
