"""Weights of a Megatron torch_dist checkpoint -> this rank's part of the model, under any layout.

Only the model is read: the optimizer starts afresh, as a new continued pre-training does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception: a BaseException

from checkpoint_convert.torch_dist import EXTRA_STATE, NOT_WEIGHTS, OUTPUT
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model.load_hf import InBase, every_weight, global_name
from megatron_cpt.runtime.compat import COMMON_STATE
from megatron_cpt.runtime.distributed import failing_together


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether `folder` itself is a torch_dist checkpoint (not a folder of several)."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()


def load_megatron_weights(
    chunks: list[GPTModel], folder: Path, in_base: InBase = every_weight, *, prefix: str = ""
) -> None:
    """Set every parameter of this rank's chunks that is `in_base` from a torch_dist checkpoint.

    Beside the weights it may hold what Megatron-LM and this trainer save with them, and nothing else. `prefix` stands
    before each key of a checkpoint that holds something else of the model's shape.

    Raises:
        CheckpointError: on every rank when any rank finds the checkpoint unreadable, of another model or with holes.
    """
    unset_weights(chunks, in_base)
    wanted = only(model_shards(chunks), chunks, in_base)
    add_prefix_for_sharding(wanted, prefix)
    known = (*NOT_WEIGHTS, *([OUTPUT] if any(chunk.share_embeddings_and_output_weights for chunk in chunks) else []))
    try:
        check_keys(wanted, folder, surplus_allowed=lambda key: key.startswith(known))
        loaded = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not hold this model: {_reason(error)}",
            hint="check that model.architecture describes the checkpoint, and that it is complete",
        ) from error
    set_model_weights(chunks, loaded, folder)


@torch.no_grad()
def unset_weights(chunks: Sequence[GPTModel], in_base: InBase = every_weight) -> None:
    """Make parameters NaN: Megatron-Core passes over a chunk that a checkpoint lacks, and so it is found."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if in_base(global_name(chunk, name)):
                parameter.fill_(float("nan"))


def only(shards: dict[str, Any], chunks: Sequence[GPTModel], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Return the part of `model_shards(chunks)` whose weights are wanted; names are those of a checkpoint."""
    return {
        name: {
            key: shard for key, shard in shards[name].items() if EXTRA_STATE in key or wanted(global_name(chunk, key))
        }
        for name, chunk in zip(_names(chunks), chunks, strict=True)
    }


def model_shards(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return the sharded state of this rank's chunks, under the names that Megatron-LM gives them."""
    return {name: _in_place(chunk.sharded_state_dict()) for name, chunk in zip(_names(chunks), chunks, strict=True)}


def _in_place(shards: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Core joins what it loaded of gate and up projections by a copy, most of the model at once."""
    return {
        key: replace(shard, merge_fn=partial(_joined, shard)) if isinstance(shard, ShardedTensorFactory) else shard
        for key, shard in shards.items()
    }


def _joined(factory: ShardedTensorFactory, parts: Any) -> torch.Tensor:
    """The tensor of which `parts` were loaded: itself, when they were loaded into its memory."""
    place = factory.data.data_ptr()
    for part in nested_values({"parts": parts}):
        if part.data_ptr() != place or not part.is_contiguous():
            joined: torch.Tensor = factory.merge_fn(parts)
            return joined
        place += part.nbytes
    return factory.data


def _names(chunks: Sequence[GPTModel]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def set_model_weights(chunks: Sequence[GPTModel], loaded: dict[str, Any], folder: Path) -> None:
    """Put the loaded state of `model_shards`, or a part of it, into the chunks.

    Raises:
        CheckpointError: a parameter is not finite afterwards, on any rank.
    """
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=False)  # `check_keys` has compared them; the rest is set already
    with failing_together():
        for chunk in chunks:
            for parameter_name, parameter in chunk.named_parameters():
                # Both ends: NaN and infinity travel to them, and nothing of the parameter's size is allocated.
                if not torch.stack(torch.aminmax(parameter)).isfinite().all():
                    raise CheckpointError(
                        f"{parameter_name} in {folder} is incomplete or not finite", hint="use another checkpoint"
                    )


def check_keys(wanted: dict[str, Any], folder: Path, *, surplus_allowed: Callable[[str], bool]) -> None:
    """Check that the checkpoint in `folder` holds what all ranks together want, and nothing else; collective.

    A key that nobody wants is a weight that would be dropped: a bias, an output layer, another model's layer. Extra
    states of TransformerEngine hold no weights and are not compared.

    Raises:
        CheckpointError: a key is missing or surplus; the same on every rank.
    """
    mine: set[str] = set()
    for shard in nested_values(wanted):
        built = nested_values({"parts": shard.build()}) if isinstance(shard, ShardedTensorFactory) else [shard]
        mine |= {part.key for part in built if hasattr(part, "key")}
    of_ranks: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    asked = {key for keys in of_ranks for key in keys if EXTRA_STATE not in key}
    stored = {shard.key for shard in load_sharded_metadata(str(folder)).values()} - {COMMON_STATE}
    surplus = {key for key in stored - asked if EXTRA_STATE not in key and not surplus_allowed(key)}
    wrong = [f"{key} is missing" for key in sorted(asked - stored)]
    wrong += [f"{key} belongs to nothing in the model" for key in sorted(surplus)]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"cannot load checkpoint {folder}: {'; '.join(wrong[:5])}{more}",
            hint="it is untouched; was it written with the config.json and the optimizer settings of this run?",
        )


def _reason(error: BaseException) -> str:
    """One line: torch wraps what each rank met, with its traceback."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
