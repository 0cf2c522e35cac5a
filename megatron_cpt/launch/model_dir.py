"""Where the Hugging Face side files of a config's model are: config.json, tokenizer, generation_config."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

# a model directory, a converted checkpoint, a run folder: where each keeps the Hugging Face side files
_CANDIDATES = (".", "hf", "../hf", "../../hf")


def architecture_dir(config: RunConfig) -> Path:
    """The directory whose config.json describes the model.

    Raises:
        ConfigError: there is none; the message lists where it was looked for.
    """
    model = config.model
    if model.architecture is not None:
        path = Path(model.architecture)
        path = path.parent if path.name == "config.json" else path
        if (path / "config.json").is_file():
            return path
        raise ConfigError(
            f"model.architecture = {model.architecture!r}: there is no {path / 'config.json'}",
            hint="name a directory that holds a Hugging Face config.json",
        )
    if model.init_from == "random":
        raise ConfigError(
            "model.init_from = 'random' says nothing of the model's shape",
            hint="set model.architecture to a directory that holds a Hugging Face config.json",
        )
    start = Path(model.init_from)
    looked = [start / candidate / "config.json" for candidate in _CANDIDATES]
    for path in looked:
        if path.is_file():
            return path.parent.resolve()
    what = "holds no config.json" if start.exists() else "does not exist"
    raise ConfigError(
        f"model.init_from = {model.init_from!r} {what}",
        hint="name a Hugging Face directory, a torch_dist checkpoint or a run folder; to plan a job whose weights are "
        "on another machine, set model.architecture to a copy of its config.json",
    )
