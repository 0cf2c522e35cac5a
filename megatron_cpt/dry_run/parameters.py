"""The weights that the ranks hold must be those of config.json: every tensor, its shape, the number of parameters."""

from __future__ import annotations

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import LAYER_PREFIX, megatron_tensors, slice_shape
from megatron_cpt.config.trainable import Trainable
from megatron_cpt.dry_run.tiling import Tiling


def expected_weights(arch: Architecture, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every weight by its key in a checkpoint, where the layers are stacked.

    The vocabulary has its padding for `tp` ranks.
    """
    padded = arch.padded_vocab_size(tp)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in megatron_tensors(arch):
        shape = slice_shape(tensor, arch, 1, padded)
        if tensor.layer is None:
            shapes[tensor.megatron] = shape
        elif tensor.layer == 0:
            shapes[LAYER_PREFIX + tensor.name_in_layer] = (arch.num_layers, *shape)
    return shapes


def count_parameters(weights: Tiling, arch: Architecture, trainable: Trainable) -> int:
    """Return how many parameters of the base model the ranks hold, each counted once, without vocabulary padding."""
    tables = {tensor.megatron for tensor in megatron_tensors(arch) if tensor.kind == "vocab"}
    return sum(
        weights.elements(key, arch.vocab_size if key in tables else None)
        for key in weights.shapes
        if trainable.in_base(name_of_key(key))
    )


def parameter_faults(weights: Tiling, arch: Architecture, tp: int, trainable: Trainable) -> list[str]:
    """Return where the weights of the ranks differ from what config.json describes."""
    expected, shapes = expected_weights(arch, tp), weights.shapes
    found = [f"{key}: no rank holds this weight of the model" for key in expected if key not in shapes]
    for key, shape in shapes.items():
        if key in expected and shape != expected[key]:
            found.append(f"{key}: the ranks hold a weight of shape {shape}, config.json describes {expected[key]}")
        elif key not in expected and trainable.in_base(name_of_key(key)):
            found.append(f"{key}: a weight of no model that config.json describes")
    counted = count_parameters(weights, arch, trainable)
    if counted != arch.num_parameters:
        found.append(f"the ranks hold {counted:,} parameters, config.json describes {arch.num_parameters:,}")
    return found


def saved_faults(weights: Tiling, saved: Tiling, trainable: Trainable, sharding: str) -> list[str]:
    """Return which weights, or whose optimizer state, no rank would save although a checkpoint must hold them.

    Under `dp_reshardable` the optimizer's state is flat buffers without the weights' names: only their tiling counts.
    """
    stored, found = saved.shapes, []
    for key, shape in weights.shapes.items():
        name = name_of_key(key)
        if trainable.saves(name) and stored.get(key) != shape:
            found.append(f"{key}: no rank saves this weight")
        if trainable.trains(name) and sharding != "dp_reshardable":
            states = (f"optimizer.state.{moment}.{key}" for moment in ("exp_avg", "exp_avg_sq"))
            found += [f"{state}: no rank saves this state of the optimizer" for state in states if state not in stored]
    return found


def name_of_key(key: str) -> str:
    """Return a name that `Trainable` knows: a stacked key has no layer, and layers of a kind are treated alike."""
    return f"{LAYER_PREFIX}0.{key.removeprefix(LAYER_PREFIX)}" if key.startswith(LAYER_PREFIX) else key
