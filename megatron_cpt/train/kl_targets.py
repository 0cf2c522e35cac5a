"""Run the base model over what a run will read, and store what it says: the targets of forgetting.kl.offline_top_k."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.data.batches import BatchStream, Sample
from megatron_cpt.data.datasets import Dataset
from megatron_cpt.data.micro_batch import cut_sequence
from megatron_cpt.errors import DataError
from megatron_cpt.forgetting.kl_store import KlStore, top_log_probabilities
from megatron_cpt.forgetting.reference import FrozenReference, load_reference
from megatron_cpt.launch.kl_targets import KlTargets, read_targets, targets_path, write_record
from megatron_cpt.launch.preflight import CheckedRun
from megatron_cpt.runtime.distributed import failing_together

RECORD_SECONDS = 60.0  # between two records of what is done: at most so much is done again after a kill


@dataclass(frozen=True)
class TargetsJob:
    """The targets of one source that a run needs."""

    dataset: Dataset
    wanted: KlTargets


def run_targets_jobs(
    run: CheckedRun, batches: BatchStream, jobs: Sequence[TargetsJob], on_progress: Callable[[int], None]
) -> None:
    """Write what is missing of each, on the ranks that `init_runtime` has joined; collective.

    `on_progress` is told how many tokens are there, over all jobs.

    Raises:
        CheckpointError: the base's weights cannot be loaded.
        DataError: the targets cannot be written.
    """
    reference = load_reference(run.config, run.arch, run.origin)
    before = 0
    for job in jobs:
        _Writer(run, batches, reference, job).write(lambda tokens, before=before: on_progress(before + tokens))  # type: ignore[misc]
        before += job.wanted.tokens


class _Writer:
    """Writes one source's targets, a round of micro-batches at a time."""

    def __init__(self, run: CheckedRun, batches: BatchStream, reference: FrozenReference, job: TargetsJob) -> None:
        self._config, self._vocab_size = run.config, run.arch.vocab_size
        self._batches, self._reference, self._job = batches, reference, job
        self._dp, self._rank = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )

    def write(self, on_progress: Callable[[int], None]) -> None:
        prefix, wanted, length = self._job.dataset.prefix, self._job.wanted, self._job.wanted.seq_length
        found = [0]
        with failing_together(), _writable(prefix):
            if dist.get_rank() == 0:
                found = [_make_room(prefix, wanted)]
        dist.broadcast_object_list(found)
        with failing_together(), _writable(prefix):
            store = KlStore(*_paths(prefix), wanted.tokens, wanted.top_k, "r+")
        done, last, recorded = found[0] // length, wanted.tokens // length, time.monotonic()
        while done < last:
            size = self._config.batch.micro_batch_size
            samples = range(done + self._rank * size, min(done + (self._rank + 1) * size, last))
            self._round(store, list(samples) or [last - 1])
            done = min(done + self._dp * size, last)
            on_progress(done * length)
            if self._is_time(recorded) or done == last:
                with failing_together(), _writable(prefix):
                    store.flush()
                with failing_together(), _writable(prefix):
                    if dist.get_rank() == 0:
                        write_record(prefix, dataclasses.replace(wanted, tokens=done * length))
                recorded = time.monotonic()

    def _is_time(self, recorded: float) -> bool:
        """Rank 0's clock, on every rank."""
        answer = [time.monotonic() - recorded >= RECORD_SECONDS]
        dist.broadcast_object_list(answer)
        return answer[0]

    def _round(self, store: KlStore, numbers: Sequence[int]) -> None:
        """Ask the base about samples of the source, and store what this rank knows of the answers."""
        length, source = self._job.wanted.seq_length, self._job.dataset.name
        batch = self._batches.read([Sample(number, source, number * length) for number in numbers], length)
        for states in self._reference.hidden_states([batch]):
            logits = self._reference.logits(states)
            first_row = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
            ids, log_q = top_log_probabilities(
                logits,
                self._job.wanted.top_k,
                first_row=first_row,
                real_rows=self._vocab_size - first_row,
                temperature=self._job.wanted.temperature,
                group=parallel_state.get_tensor_model_parallel_group(),
            )
            if parallel_state.get_tensor_model_parallel_rank() != 0:
                continue
            own = cut_sequence(
                torch.arange(length),
                0,
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_context_parallel_world_size(),
            ).numpy()
            for column, number in enumerate(numbers):
                store.write(number * length + own, ids[:, column], log_q[:, column])


def _make_room(prefix: str, wanted: KlTargets) -> int:
    """Grow the files to what is wanted. Return the tokens that are there already."""
    found = read_targets(prefix)
    for path, size in zip(_paths(prefix), wanted.file_bytes.values(), strict=True):
        with path.open("r+b" if found is not None else "wb") as file:
            file.truncate(max(size, path.stat().st_size))
    return 0 if found is None else min(found.tokens, wanted.tokens)


def _paths(prefix: str) -> tuple[Path, Path]:
    return targets_path(prefix, "ids"), targets_path(prefix, "logq")


@contextlib.contextmanager
def _writable(prefix: str) -> Iterator[None]:
    """Errors of the file system, as one that names the targets."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {prefix}.kl.*: {error.strerror or error}",
            hint="the folder of the dataset must be writable, on every node, and have room for the targets",
        ) from error
