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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_cpt import __version__
from megatron_cpt.budget import format_count
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model.load_megatron import check_keys
from megatron_cpt.runs.checkpoints import (
    checkpoint_path,
    complete_checkpoints,
    faults,
    format_bytes,
    leave_shard_hashes,
    read_best,
    remove_partials,
    seal,
    update_best,
    would_be_best,
)
from megatron_cpt.runs.folder import RunFolder, resolved_yaml
from megatron_cpt.runs.lease import Lease
from megatron_cpt.runs.marker import Marker
from megatron_cpt.runs.retention import Retention
from megatron_cpt.runtime.compat import begin_save
from megatron_cpt.runtime.distributed import failing_together
from megatron_cpt.train.checkpoint_errors import SaveFailed, named_failure, save_failed
from megatron_cpt.train.checkpoint_space import CheckpointSpace
from megatron_cpt.train.checkpoint_state import (
    RANDOM_STATES,
    layout,
    optimizer_sharding,
    put_state,
    refuse_other_split,
    saved_state,
    wanted_state,
)
from megatron_cpt.train.position import Position
from megatron_cpt.train.state import TrainState, gathered_parameters
from megatron_cpt.train.thread_writer import Staging, ThreadQueue, in_thread

logger = logging.getLogger(__name__)


_WRITER_NICENESS = 10  # a writer in the background leaves the processor to the ranks


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
        self.lease = lease  # of rank 0
        self.root = folder.checkpoints
        self._space = CheckpointSpace(folder.checkpoints, Retention.from_config(config), first_bytes)
        self.attempt = attempt
        self.last_saved = -1  # iteration
        self._staging = None if torch.cuda.is_available() else Staging()
        self._queue = AsyncCallsQueue() if self._staging is None else ThreadQueue()
        self._structure: set[Any] = set()  # of what this rank saves; while it stays the plan of a save does
        self._strategy: TorchDistSaveShardedStrategy | None = None
        self._validated = False  # Megatron-Core has seen that the ranks' shards fit together
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
        refused: list[SaveFailed | None] = [None]
        if dist.get_rank() == 0:
            self._space.finish_removal()
            refused[0] = self._space.make_room(partial)
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        if not partial.is_dir():
            raise CheckpointError(
                f"cannot save to {partial}: rank 0 made the folder, this node does not see it",
                hint="the run folder must be on storage that all nodes share",
            )
        marker = self._marker(state, position)
        asynchronous = self.config.checkpoint.async_save and not wait
        with gathered_parameters(state), named_failure(partial):
            saved = saved_state(state)
            self._plan_anew_if_changed(saved, state.device)
            assert self._strategy is not None
            request = begin_save(saved, partial, self._strategy, validate=not self._validated)
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
            self._space.finish_removal()

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
            with named_failure(self._pending.partial):
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
            raise self.lease.lost()
        final = checkpoint_path(self.root, pending.marker.iteration)
        try:
            marker = seal(pending.partial, final, resolved_yaml(self.config), pending.marker)
        except OSError as error:
            raise save_failed(pending.partial, f"rank 0: {error}") from error
        logger.info(
            "checkpoint %s is complete: %s at %s tokens",
            final,
            format_bytes(marker.total_bytes),
            format_count(marker.consumed_tokens),
        )
        try:
            weights = self.config.checkpoint.best_weights
            if weights and marker.memory.get("gate", {}).get("within", True):
                update_best(self.root, weights, marker)
            self._space.retain()
        except (OSError, CheckpointError) as error:
            logger.error("cannot tidy up %s: %s", self.root, error)

    def _marker(self, state: TrainState, position: Position) -> Marker:
        versions = {"megatron_cpt": __version__, "torch": torch.__version__, "megatron_core": megatron_core_version}
        return Marker(
            iteration=position.iteration,
            consumed_tokens=position.ledger.tokens,
            ledger=position.ledger.to_json(),
            layout=layout(state.config),
            optimizer_sharding=optimizer_sharding(state.config),
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

    def best(self) -> tuple[Path, Marker] | None:
        """The sound checkpoint that best.json names, the same on all ranks; None without one."""
        named = [read_best(self.root) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(named)
        best = named[0]
        return self._first_sound([c for c in self._candidates() if best and c[1].iteration == best["iteration"]])

    def would_be_best(self, position: Position) -> bool:
        """Whether a checkpoint of `position`, just validated, would be the best so far; the same on all ranks."""
        weights = self.config.checkpoint.best_weights
        answer = [dist.get_rank() == 0 and bool(weights) and would_be_best(self.root, weights, position.validation)]
        dist.broadcast_object_list(answer)
        return answer[0]

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
        refuse_other_split(path, marker, layout(state.config))
        wanted = wanted_state(state, marker.optimizer_sharding, with_random=same_layout)
        with named_failure(path, "load"):
            check_keys(wanted, path, surplus_allowed=lambda key: key == RANDOM_STATES)
            loaded = dist_checkpointing.load(wanted, str(path))
        put_state(state, loaded, path)
        self.last_saved = marker.iteration
        return Position.from_marker(marker)


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
