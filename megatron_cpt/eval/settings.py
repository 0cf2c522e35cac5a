"""How a run validates, so that evaluating it afterwards gives the same number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.load import load_config


@dataclass(frozen=True)
class EvalSettings:
    """What the loss of a model on a dataset depends on, beside the two."""

    seq_length: int
    document_attention: bool
    max_tokens: int | None  # None: all


def settings_of_run(run_config: Path) -> EvalSettings:
    """Return how the run of the given resolved.yaml validates.

    Raises:
        ConfigError: the file is no config of this version.
    """
    config = load_config(run_config, [])
    return EvalSettings(config.batch.seq_length, config.model.document_attention, config.eval.tokens)
