"""The weights that `model.init_from` names, of whatever kind, -> this rank's part of a model."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.launch.origin import Origin
from megatron_cpt.model.load_hf import InBase, every_weight, load_hf_weights, random_weights
from megatron_cpt.model.load_megatron import load_megatron_weights


def load_from_origin(
    chunks: list[GPTModel], origin: Origin, arch: Architecture, seed: int, in_base: InBase = every_weight
) -> None:
    """Set every parameter of this rank's chunks that is `in_base`; `seed` is that of random weights.

    Raises:
        CheckpointError: on every rank, when the weights are missing, damaged or of another model.
    """
    if origin.kind == "random":
        random_weights(chunks, arch, seed, in_base)
    elif origin.kind == "torch_dist":
        load_megatron_weights(chunks, origin.weights, in_base)
    else:
        load_hf_weights(chunks, origin.weights, arch, in_base)
