"""What a rank saves in a checkpoint, what it wants of one, and how what was loaded is put in place."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model.load_megatron import model_shards, only, set_model_weights
from megatron_cpt.runs.marker import Marker
from megatron_cpt.runtime.compat import adopt_learning_rates
from megatron_cpt.train.optimizer_shards import (
    optimizer_shards,
    put_optimizer_state,
    standing_alone,
    wanted_optimizer_shards,
)
from megatron_cpt.train.state import TrainState, unwrap

logger = logging.getLogger(__name__)

RANDOM_STATES = "random_states"  # key of the random states in a checkpoint


def layout(config: RunConfig) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tp": parallel.tp,
        "pp": parallel.pp,
        "cp": parallel.cp,
        "vpp": parallel.vpp or 1,
        "dp": parallel.data_parallel_size,
        **{name: n for name in ("first_stage_layers", "last_stage_layers") if (n := getattr(parallel, name))},
    }


def refuse_other_split(path: Path, marker: Marker, wanted: dict[str, int]) -> None:
    """`dp_reshardable` stores flat buffers of a stage's parameters, which mean nothing under another split."""
    if marker.optimizer_sharding != "dp_reshardable":
        return
    stored = marker.layout
    moved = [key for key in sorted(stored | wanted) if key not in ("dp", "cp") and stored.get(key) != wanted.get(key)]
    if moved:
        shown = ", ".join(f"{key} {stored.get(key, 'unset')} -> {wanted.get(key, 'unset')}" for key in moved)
        raise CheckpointError(
            f"{path} was saved with optimizer_sharding dp_reshardable, which fixes how the model is split: {shown}",
            hint="continue under the layout it was saved with, and set checkpoint.optimizer_sharding: "
            "fully_reshardable for the checkpoints from there on",
        )


def optimizer_sharding(config: RunConfig) -> str:
    return config.checkpoint.optimizer_sharding if config.parallel.distributed_optimizer else "replicated"


def _model_shards(state: TrainState) -> dict[str, Any]:
    return model_shards([unwrap(chunk) for chunk in state.chunks])


def _saved_part(state: TrainState, models: dict[str, Any]) -> dict[str, Any]:
    return only(models, [unwrap(chunk) for chunk in state.chunks], state.trainable.saves)


def saved_state(state: TrainState) -> dict[str, Any]:
    """What this rank saves."""
    models = _model_shards(state)
    optimizer = optimizer_shards(state.optimizer, models, optimizer_sharding(state.config))
    saved = {**_saved_part(state, models), "optimizer": optimizer, "random": _random_states()}
    apply_factories(saved)
    for shard in nested_values(saved):
        if isinstance(shard, ShardedTensor):
            shard.data = standing_alone(shard.data)
    return saved


def wanted_state(state: TrainState, sharding: str, *, with_random: bool) -> dict[str, Any]:
    """What this rank loads of a checkpoint whose optimizer is stored as `sharding`."""
    models = _model_shards(state)
    optimizer = wanted_optimizer_shards(state.optimizer, models, sharding)
    random_states = {"random": _random_states()} if with_random else {}
    return {**_saved_part(state, models), "optimizer": optimizer, **random_states}


def _random_states() -> ShardedObject:
    """This rank's random states, one object per rank."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return ShardedObject(RANDOM_STATES, states, (dist.get_world_size(),), (dist.get_rank(),))


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if (states["cuda"] is not None) != torch.cuda.is_available():  # their generators have no state in common
        logger.info("the checkpoint is from another kind of device: its random states start anew from the seed")
        return
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def put_state(state: TrainState, loaded: dict[str, Any], path: Path) -> None:
    """Put what was loaded from the checkpoint at `path` into `state`; without random states they start anew.

    Raises:
        CheckpointError: a weight is not finite; on every rank.
    """
    set_model_weights([unwrap(chunk) for chunk in state.chunks], loaded, path)
    adopt_learning_rates(loaded["optimizer"], state.optimizer.param_groups[0])
    with torch.no_grad():  # dp_reshardable copies into leaf parameters
        put_optimizer_state(state.optimizer, loaded["optimizer"], _model_shards(state))
    if "random" in loaded:
        _set_random_states(loaded["random"])
    else:
        logger.info("the layout changed since the checkpoint: random states start anew from the seed")
