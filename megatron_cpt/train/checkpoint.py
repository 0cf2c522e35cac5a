"""Save and load the whole training state as a Megatron torch_dist checkpoint.

Inside: model (the keys of `GPTModel.sharded_state_dict()`), optimizer with fp32 master weights and moments, each
rank's random states, and in complete.json the ledger, tokens, layout and versions. The schedule is not state.

A save is collective. With `async_save` the loop goes on while a writer of each rank works: a process that
Megatron-Core forks, or on a CPU a thread with a copy of what is saved; `poll` finishes the save. What is planned for
the first saves is reused by the later ones. The files go to a folder that only this attempt of the run writes to; when
all ranks have flushed, rank 0 renames it and writes the marker, so a crash at any moment leaves the previous
checkpoint the newest complete one.
"""

from __future__ import annotations

import datetime
import logging
import os
import random
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpt import __version__
from megatron_cpt.budget import format_count
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.checkpoints import (
    checkpoint_path,
    complete_checkpoints,
    faults,
    format_bytes,
    free_bytes,
    leave_shard_hashes,
    list_checkpoints,
    read_best,
    remove_partials,
    seal,
    set_aside,
    update_best,
)
from megatron_cpt.runs.folder import RunFolder, resolved_yaml
from megatron_cpt.runs.lease import Lease
from megatron_cpt.runs.marker import Marker
from megatron_cpt.runs.retention import Retention
from megatron_cpt.runtime.distributed import failing_together
from megatron_cpt.train.optimizer_shards import optimizer_shards, standing_alone
from megatron_cpt.train.position import Position
from megatron_cpt.train.state import TrainState, gathered_parameters, unwrap
from megatron_cpt.train.thread_writer import Staging, ThreadQueue, in_thread

logger = logging.getLogger(__name__)


_WRITER_NICENESS = 10  # a writer in the background leaves the processor to the ranks


class SaveFailed(CheckpointError):
    """A save could not be written, and every rank knows: the run may go on without it."""


@dataclass
class _Pending:
    """A save that is being written, and its marker but for the tables of files."""

    partial: Path
    marker: Marker


class CheckpointManager:
    """Owns RUN/checkpoints for this attempt of the run; every method is called on all ranks together."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, attempt: int, lease: Lease | None, first_bytes: int
    ) -> None:
        self.config = config
        self.first_bytes = first_bytes  # predicted size of the first checkpoint
        self.lease = lease  # of rank 0
        self.root = folder.checkpoints
        self.retention = Retention.from_config(config.checkpoint)
        self.attempt = attempt
        self.last_saved = -1  # iteration
        self._staging = None if torch.cuda.is_available() else Staging()
        self._queue = AsyncCallsQueue() if self._staging is None else ThreadQueue()
        self._structure: set[Any] = set()  # of what this rank saves; while it stays the plan of a save does
        self._strategy: TorchDistSaveShardedStrategy | None = None
        self._validated = False  # Megatron-Core has seen that the ranks' shards fit together
        self._removal: threading.Thread | None = None
        self._pending: _Pending | None = None
        if dist.get_rank() == 0 and (abandoned := remove_partials(self.root)):
            logger.info("removed %d unfinished checkpoint(s) of earlier attempts", abandoned)

    # -- save -----------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, position: Position, *, wait: bool = False) -> None:
        """Begin to save; `wait` (and `checkpoint.async_save: false`) returns when it is complete.

        Raises:
            SaveFailed: the save could not be written; on all ranks.
            CheckpointError: a failure of this rank alone; the job must end.
        """
        assert self._pending is None, "finish the save before this one first: poll(wait=True)"
        if position.guard.skips_in_row >= position.iteration:  # then the optimizer has no state either
            raise SaveFailed(
                f"no checkpoint at iteration {position.iteration}: every step so far was skipped",
                hint="the events `skipped` of metrics.jsonl say why",
            )
        partial = checkpoint_path(self.root, position.iteration)
        partial = partial.with_name(f"{partial.name}.partial-{self.attempt}")
        if dist.get_rank() == 0:
            self._finish_removal()
            self._make_room(partial)
        dist.barrier()
        if not partial.is_dir():
            raise SaveFailed(
                f"cannot create {partial}: {self._why_no_room() or 'rank 0 did, this node does not see it'}",
                hint="the run folder must be on storage that all nodes share, with space left",
            )
        marker = self._marker(state, position)
        asynchronous = self.config.checkpoint.async_save and not wait
        with gathered_parameters(state), _named_failure(partial):
            saved = _saved_state(state)
            self._plan_anew_if_changed(saved, state.device)
            request = dist_checkpointing.save(
                saved,
                str(partial),
                self._strategy,
                validate_access_integrity=not self._validated,
                async_sharded_save=True,
            )
            assert request is not None
            self._validated = True
            if self._staging is not None:
                request = in_thread(request, self._staging if asynchronous else None)
            if asynchronous:
                self._queue.schedule_async_request(_hashing(request, partial, _WRITER_NICENESS))
            else:
                _hashing(request, partial).execute_sync()
        self._pending = _Pending(partial, marker)
        if not asynchronous:
            self._seal()
            self._finish_removal()

    def _plan_anew_if_changed(self, saved: dict[str, Any], device: torch.device) -> None:
        """Forget the plan of earlier saves when a rank has other tensors: Megatron-Core would write by the old one."""
        structure = {
            (shard.key, tuple(shard.global_offset), tuple(shard.global_shape))
            for shard in nested_values(saved)
            if isinstance(shard, ShardedTensor | ShardedObject)
        }
        changed = torch.tensor([float(structure != self._structure)], device=device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX)
        if changed.item():
            self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
            self._validated, self._structure = False, structure

    def poll(self, *, wait: bool = False) -> bool:
        """Finish a save whose files are written on all ranks; True when one was finished by this call."""
        if self._pending is None:
            return False
        try:
            with _named_failure(self._pending.partial):
                if not self._queue.maybe_finalize_async_calls(blocking=wait):
                    return False
        except SaveFailed:
            self._pending = None
            raise
        self._seal()
        return True

    def _seal(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        with failing_together():
            if dist.get_rank() == 0:
                self._seal_files(pending)
        self.last_saved = pending.marker.iteration

    def _seal_files(self, pending: _Pending) -> None:
        if self.lease is not None and not self.lease.still_held():
            raise CheckpointError(
                f"{self.lease.path} was taken over by another job; this one stops without touching the folder",
                hint="see megatron-cpt status; two jobs must not share a run folder",
            )
        final = checkpoint_path(self.root, pending.marker.iteration)
        try:
            marker = seal(pending.partial, final, resolved_yaml(self.config), pending.marker)
        except OSError as error:
            raise _save_failed(pending.partial, f"rank 0: {error}") from error
        logger.info(
            "checkpoint %s is complete: %s at %s tokens",
            final,
            format_bytes(marker.total_bytes),
            format_count(marker.consumed_tokens),
        )
        try:
            if self.config.checkpoint.best_by is not None:
                update_best(self.root, self.config.checkpoint.best_by, marker)
            self._retain()
        except (OSError, CheckpointError) as error:
            logger.error("cannot tidy up %s: %s", self.root, error)

    def _make_room(self, partial: Path) -> None:
        if why := self._why_no_room():
            logger.error("no checkpoint of this step: %s", why)
            return
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.error("cannot create %s: %s", partial, error.strerror)

    def _why_no_room(self) -> str | None:
        expected, free = self.expected_bytes(), free_bytes(self.root)
        return f"it needs {expected:,} bytes and {free:,} are free" if free < expected else None

    def expected_bytes(self) -> int:
        """Size of the next checkpoint: that of the newest one, or predicted while there is none."""
        markers = [checkpoint.marker for checkpoint in list_checkpoints(self.root) if checkpoint.marker is not None]
        return markers[-1].total_bytes if markers else self.first_bytes

    def _retain(self) -> None:
        best = read_best(self.root)
        removed = []
        for path in self.retention.removable(complete_checkpoints(self.root), best["iteration"] if best else None):
            logger.info("retention removes %s", path)
            removed.append(set_aside(path))
        if removed:  # deleting gigabytes takes a while, and the loop need not wait for it
            self._finish_removal()
            self._removal = threading.Thread(target=_remove_all, args=(removed,))
            self._removal.start()

    def _finish_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _marker(self, state: TrainState, position: Position) -> Marker:
        versions = {"megatron_cpt": __version__, "torch": torch.__version__, "megatron_core": megatron_core_version}
        return Marker(
            iteration=position.iteration,
            consumed_tokens=position.ledger.tokens,
            ledger=position.ledger.to_json(),
            layout=layout(state.config),
            optimizer_sharding=_sharding(state.config),
            attempt=self.attempt,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions,
            validation=dict(position.validation),
            memory=position.memory_json(),
        )

    # -- load -----------------------------------------------------------------------------------------------------

    def choose(self) -> tuple[Path, Marker] | None:
        """The newest complete checkpoint without faults, the same on all ranks; None when the run has none.

        Raises:
            CheckpointError: there are complete checkpoints, and all are damaged.
        """
        candidates = self._candidates()
        chosen = self._first_sound(candidates)
        if candidates and chosen is None:
            raise CheckpointError(
                f"every checkpoint in {self.root} is damaged; the log says how",
                hint="restore one from a copy, or move the folder away to start from the beginning",
            )
        return chosen

    def newest_before(self, iteration: int) -> tuple[Path, Marker] | None:
        """The newest sound checkpoint of `iteration` or before, the same on all ranks."""
        return self._first_sound([c for c in self._candidates() if c[1].iteration <= iteration])

    def _candidates(self) -> list[tuple[Path, Marker]]:
        """Complete checkpoints, newest first, as rank 0 sees them."""
        found = [complete_checkpoints(self.root) if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(found)
        return found[0]

    def _first_sound(self, candidates: list[tuple[Path, Marker]]) -> tuple[Path, Marker] | None:
        """The first without faults. Each rank hashes its share of the files."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for path, marker in candidates:
            shares: list[list[str]] = [[] for _ in range(ranks)]
            dist.all_gather_object(shares, faults(path, marker, sorted(marker.file_bytes)[rank::ranks]))
            found = [fault for share in shares for fault in share]
            if not found:
                return path, marker
            if rank == 0:
                shown = "; ".join(sorted(found)[:3])
                logger.error("%s is damaged (%s): falling back to the one before it", path, shown)
        return None

    def load(self, state: TrainState, path: Path, marker: Marker) -> Position:
        """Put the checkpoint at `path` into `state`; returns where the run stands.

        Raises:
            CheckpointError: it cannot be read, or does not fit the model.
        """
        same_layout = marker.layout == layout(state.config)
        _refuse_other_split(path, marker, layout(state.config))
        wanted = _wanted_state(state, marker.optimizer_sharding, with_random=same_layout)
        with _named_failure(path, "load"):
            loaded = dist_checkpointing.load(wanted, str(path))
        for key, chunk in zip(_model_keys(state), state.chunks, strict=True):
            unwrap(chunk).load_state_dict(loaded[key])
        with failing_together():  # Megatron-Core reads a chunk that is missing from a checkpoint as NaN, in silence
            for name, parameter in ((n, p) for chunk in state.chunks for n, p in chunk.named_parameters()):
                if not parameter.isfinite().all():
                    raise CheckpointError(
                        f"{name} in {path} is incomplete or not finite", hint="use another checkpoint"
                    )
        with torch.no_grad():  # dp_reshardable copies into leaf parameters
            state.optimizer.load_state_dict(loaded["optimizer"])
        if same_layout:
            _set_random_states(loaded["random"])
        else:
            logger.info("the layout changed since the checkpoint: random states start anew from the seed")
        self.last_saved = marker.iteration
        return Position.from_marker(marker)


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


def _refuse_other_split(path: Path, marker: Marker, wanted: dict[str, int]) -> None:
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


def _sharding(config: RunConfig) -> str:
    return config.checkpoint.optimizer_sharding if config.parallel.distributed_optimizer else "replicated"


def _model_keys(state: TrainState) -> list[str]:
    return ["model"] if len(state.chunks) == 1 else [f"model{i}" for i in range(len(state.chunks))]


def _model_shards(state: TrainState) -> dict[str, Any]:
    return {
        key: unwrap(chunk).sharded_state_dict() for key, chunk in zip(_model_keys(state), state.chunks, strict=True)
    }


def _saved_state(state: TrainState) -> dict[str, Any]:
    """What this rank saves."""
    models = _model_shards(state)
    optimizer = optimizer_shards(state.optimizer, models, _sharding(state.config))
    saved = {**models, "optimizer": optimizer, "random": _random_states()}
    apply_factories(saved)
    for shard in nested_values(saved):
        if isinstance(shard, ShardedTensor):
            shard.data = standing_alone(shard.data)
    return saved


def _wanted_state(state: TrainState, sharding: str, *, with_random: bool) -> dict[str, Any]:
    """What this rank loads of a checkpoint whose optimizer is stored as `sharding`."""
    models = _model_shards(state)
    metadata = {"distrib_optim_sharding_type": sharding} if sharding != "replicated" else {}
    optimizer = state.optimizer.sharded_state_dict(dict(models), is_loading=True, metadata=metadata)
    return {**models, "optimizer": optimizer, **({"random": _random_states()} if with_random else {})}


def _random_states() -> ShardedObject:
    """This rank's random states, one object per rank."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return ShardedObject("random_states", states, (dist.get_world_size(),), (dist.get_rank(),))


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _hashing(request: AsyncRequest, folder: Path, niceness: int = 0) -> AsyncRequest:
    """`request` whose writer, this rank's, also hashes its files; `niceness` is for one with a thread of its own."""
    write = request.async_fn
    if write is None:
        return request  # nothing to write on this rank
    rank, buckets = request.async_fn_args[0], request.async_fn_args[1]
    names = [storage_key for _, storage_key, _ in buckets]

    def write_and_hash(*args: Any, **kwargs: Any) -> None:
        if niceness and sys.platform == "linux":  # elsewhere it would be that of all threads
            os.nice(niceness)
        write(*args, **kwargs)
        leave_shard_hashes(folder, rank, names)

    return request._replace(async_fn=write_and_hash)


def _save_failed(path: Path, why: str) -> SaveFailed:
    """The error of a save whose files, if any, are deleted."""
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    return SaveFailed(
        f"cannot save checkpoint {path}: {why}",
        hint="is the disk full? the newest complete checkpoint is untouched",
    )


class _named_failure:
    """Errors of Megatron-Core and the file system while saving or loading `path`, as a CheckpointError."""

    def __init__(self, path: Path, doing: str = "save") -> None:
        self.path, self.doing = path, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, CheckpointException):  # torch's: raised on all ranks when any could not write
            logger.debug("details", exc_info=error)
            causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
            if self.doing == "save":
                raise _save_failed(self.path, causes or "another rank could not") from error
            raise CheckpointError(
                f"cannot {self.doing} checkpoint {self.path}: {causes or 'another rank could not'}",
                hint="it is untouched; does it belong to this model, layout and optimizer?",
            ) from error
        expected = (OSError, RuntimeError, ValueError, KeyError, dist_checkpointing.core.CheckpointingException)
        if isinstance(error, expected):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.debug("details", exc_info=error)
            raise CheckpointError(
                f"cannot {self.doing} checkpoint {self.path}: {first}",
                hint="the newest complete checkpoint is untouched; start again to continue from it",
            ) from error


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
