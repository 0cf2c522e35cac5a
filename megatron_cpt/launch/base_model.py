"""Is the model a base model? Continued pre-training undoes what makes a chat model one, so those are refused.

Nothing in a checkpoint says it plainly. The signs: its name, and that generation stops at the end of a turn of a
conversation. (A chat template is no sign: Qwen's base models have one.)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

_NAME = re.compile(r"(^|[-_./])(instruct|chat|it|dpo|rlhf)($|[-_./])", re.IGNORECASE)
_END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"}


def refuse_instruct_model(config: RunConfig, model_dir: Path) -> None:
    """ConfigError when the model in `model_dir` looks like a chat model and the config does not allow one."""
    if config.model.allow_instruct or config.model.init_from == "random":
        return
    if sign := sign_of_instruct(model_dir):
        raise ConfigError(
            f"model.init_from = {config.model.init_from!r} looks like an Instruct/Chat model: {sign}",
            hint="continue from the base model, or set model.allow_instruct: true if you mean it",
        )


def sign_of_instruct(model_dir: Path) -> str | None:
    """What gives a chat model away, None for a base model."""
    config = _read_json(model_dir / "config.json")
    for name in (model_dir.name, str(config.get("_name_or_path", ""))):
        if _NAME.search(name):
            return f"its name is {name!r}"
    ends = _ids(config) | _ids(_read_json(model_dir / "generation_config.json"))
    for token_id, text in _special_tokens(model_dir).items():
        if token_id in ends and text in _END_OF_TURN:
            return f"generation stops at {text}, the end of a turn of a conversation"
    return None


def _ids(config: dict[str, Any]) -> set[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {token_id for token_id in values if isinstance(token_id, int)}


def _special_tokens(model_dir: Path) -> dict[int, str]:
    added = _read_json(model_dir / "tokenizer.json").get("added_tokens", [])
    return {token["id"]: token["content"] for token in added}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent files say nothing here; the readers of their content report damage
        return {}
    return content if isinstance(content, dict) else {}
