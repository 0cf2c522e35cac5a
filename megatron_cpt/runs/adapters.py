"""Whether a folder holds adapters alone: a checkpoint, as its own resolved.yaml says, or what peft wrote."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.errors import CheckpointError, ConfigError

PEFT_CONFIG = "adapter_config.json"


def adapters_of(checkpoint: Path) -> LoraConfig | None:
    """Return the settings of the adapters in `checkpoint`; None when it holds a whole model, or does not say.

    Of one that does not say, whoever reads its weights finds out which are missing.
    """
    path = checkpoint / "resolved.yaml"
    try:
        lora = LoraConfig.model_validate(read_yaml(path).get("lora") or {})
    except (ConfigError, ValueError):
        return None
    return lora if lora.on else None


def refuse_adapters(checkpoint: Path) -> None:
    """Raise CheckpointError when `checkpoint` holds adapters alone, ours or peft's, which are no model."""
    if (checkpoint / PEFT_CONFIG).is_file() and not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} holds adapters of peft alone, and no weights of a model",
            hint=f"`megatron-cpt merge-lora {checkpoint} OUT` makes a model of them and their base",
        )
    if (lora := adapters_of(checkpoint)) is not None:
        raise CheckpointError(
            f"{checkpoint} holds adapters of rank {lora.rank} alone, and no weights of a model",
            hint="`megatron-cpt merge-lora RUN OUT` makes a model of them and their base, `megatron-cpt convert RUN "
            "OUT --to peft` writes them for peft; the run itself continues when it is started again",
        )
