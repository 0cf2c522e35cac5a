"""Whether a checkpoint of a run holds adapters alone, as its own resolved.yaml says."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.errors import CheckpointError, ConfigError


def adapters_of(checkpoint: Path) -> LoraConfig | None:
    """Return the settings of the adapters in `checkpoint`; None when it holds a whole model, or is not ours.

    Raises:
        CheckpointError: its resolved.yaml cannot be read.
    """
    path = checkpoint / "resolved.yaml"
    if not path.is_file():
        return None
    try:
        lora = LoraConfig.model_validate(read_yaml(path).get("lora") or {})
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not the config of a run: {error}", hint="restore it from a copy, or take another checkpoint"
        ) from error
    return lora if lora.on else None


def refuse_adapters(checkpoint: Path) -> None:
    """Raise CheckpointError when `checkpoint` holds adapters alone, which are no model."""
    if (lora := adapters_of(checkpoint)) is not None:
        raise CheckpointError(
            f"{checkpoint} holds adapters of rank {lora.rank} alone, and no weights of a model",
            hint="name the model that the adapters were trained on; the run itself continues when it is started again",
        )
