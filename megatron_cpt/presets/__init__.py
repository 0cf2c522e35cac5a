"""Known models and how to lay them out on 1, 8 or 32 GPUs, as data that `megatron-cpt init` reads.

`models.yaml` holds the facts of config.json, `layouts.yaml` what a size of model needs on a number of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import architecture_from_config
from megatron_cpt.config.problems import near_match
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.errors import ConfigError

GPUS_PER_NODE = 8
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """A model as its publisher describes it."""

    name: str
    hub: str  # where it is published
    parameters_millions: int  # as published
    layouts: str  # its group in layouts.yaml
    hf_config: dict[str, Any]  # the content of config.json
    instruct_only: bool  # no base model was published

    @property
    def architecture(self) -> Architecture:
        return architecture_from_config(self.hf_config)


@cache
def presets() -> dict[str, Preset]:
    """Every known model by its name."""
    data = read_yaml(_FOLDER / "models.yaml", what="presets")
    found = {}
    for name, entry in data["models"].items():
        facts = {"model_type": entry["family"], **data["defaults"][entry["family"]], **entry["config"]}
        instruct_only = entry.get("instruct_only", False)
        found[name] = Preset(name, entry["hub"], entry["parameters"], entry["layouts"], facts, instruct_only)
    return found


def find_preset(name: str) -> Preset:
    """The preset of a name, in any case.

    Raises:
        ConfigError: there is none; the hint lists them.
    """
    known = presets()
    if (found := known.get(name.lower())) is not None:
        return found
    near = near_match(name.lower(), known)
    raise ConfigError(
        f"there is no preset {name!r}",
        hint=f"did you mean {near!r}?" if near else f"one of {', '.join(known)}",
    )


def layout(arch: Architecture, gpus: int) -> dict[str, dict[str, Any]]:
    """Sections of a run's config for a model on a number of 80 GB GPUs: that of the next smaller known number.

    Raises:
        ConfigError: the model is too large for so few, or the number does not divide into nodes or replicas.
    """
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise ConfigError(
            f"{gpus} GPUs do not fill nodes of {GPUS_PER_NODE}",
            hint=f"--gpus {gpus // GPUS_PER_NODE * GPUS_PER_NODE} or {(gpus // GPUS_PER_NODE + 1) * GPUS_PER_NODE}",
        )
    known = _layouts_of(arch)
    fitting = [number for number in known if number <= gpus and gpus % _model_parallel_size(known[number]) == 0]
    if not fitting:
        size = f"{arch.num_parameters / 1e9:.1f} billion parameters"
        fewest = min(known)
        raise ConfigError(
            f"full continued pre-training of {size} has no layout on {gpus} GPUs of 80 GB",
            hint=f"--gpus {fewest} is the fewest, or a multiple of {_model_parallel_size(known[fewest])} above it",
        )
    found = {section: dict(values) for section, values in known[max(fitting)].items()}
    nodes = {"nodes": max(1, gpus // GPUS_PER_NODE), "gpus_per_node": min(gpus, GPUS_PER_NODE)}
    parallel = nodes | found.get("parallel", {})
    if gpus == _model_parallel_size(found):
        parallel.pop("overlap_grad_reduce", None)  # one replica has nothing to reduce
    return {**found, "parallel": parallel}


def _model_parallel_size(sections: dict[str, dict[str, Any]]) -> int:
    parallel = sections.get("parallel", {})
    size: int = parallel.get("tp", 1) * parallel.get("pp", 1)
    return size


def _layouts_of(arch: Architecture) -> dict[int, dict[str, dict[str, Any]]]:
    """Number of GPUs -> sections, of the smallest group that holds a model of this size."""
    groups = read_yaml(_FOLDER / "layouts.yaml", what="layouts")
    for group in sorted(groups.values(), key=lambda group: float(group["max_parameters"])):
        if arch.num_parameters <= float(group["max_parameters"]):
            layouts: dict[int, dict[str, dict[str, Any]]] = group["gpus"]
            return layouts
    raise ConfigError(
        f"there is no layout for a model of {arch.num_parameters / 1e9:.0f} billion parameters",
        hint="start from examples/qwen2_72b/config.yaml and raise parallel.pp; megatron-cpt plan checks it",
    )
