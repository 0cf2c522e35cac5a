"""Estimate Fisher values on the ranks of a job, and save them as a distributed checkpoint."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel

from megatron_cpt import __version__
from megatron_cpt.data.micro_batch import MicroBatch
from megatron_cpt.data.validation import ValidationSet
from megatron_cpt.durable import sync, write_atomically
from megatron_cpt.errors import CheckpointError
from megatron_cpt.forgetting.fisher import FISHER_PREFIX, estimate_fisher, for_fisher
from megatron_cpt.launch.fisher import RECORD, FisherJob, FisherRecord
from megatron_cpt.model.build import DTYPES, build_model
from megatron_cpt.model.load_megatron import model_shards
from megatron_cpt.model.load_origin import load_from_origin
from megatron_cpt.runtime.compat import begin_save
from megatron_cpt.runtime.distributed import failing_together
from megatron_cpt.train.checkpoint_errors import named_failure
from megatron_cpt.train.thread_writer import in_thread

logger = logging.getLogger(__name__)


def run_fisher_job(job: FisherJob, on_progress: Callable[[int], None]) -> FisherRecord:
    """Estimate and save on the ranks that `init_runtime` has joined; collective.

    `on_progress` is told how many samples are done.

    Raises:
        CheckpointError: the weights cannot be loaded, the values are not finite, or they cannot be written.
    """
    config = for_fisher(job.config)
    chunks = [chunk.to(DTYPES[config.precision.dtype]) for chunk in build_model(config, job.arch)]
    load_from_origin(chunks, job.origin, job.arch, config.seed)
    tokens = estimate_fisher(
        chunks, _reader(job), job.samples, seed=config.seed, vocab_size=job.arch.vocab_size, on_progress=on_progress
    )
    with failing_together():
        for chunk in chunks:
            for name, values in chunk.named_parameters():
                if not values.isfinite().all():
                    raise CheckpointError(
                        f"the Fisher values of {name} are not finite",
                        hint="check that the model's loss is finite on --data: megatron-cpt eval perplexity",
                    )
    return save_fisher(chunks, job, tokens)


def _reader(job: FisherJob) -> Callable[[int], MicroBatch]:
    """The samples: blocks spread evenly over the dataset, read by their number."""
    held = ValidationSet(job.dataset, job.config.batch.seq_length, documents_apart=job.config.model.document_attention)
    whole = held.predicted_tokens // job.config.batch.seq_length
    return lambda number: held.read([number * whole // job.samples])


def save_fisher(chunks: list[GPTModel], job: FisherJob, tokens: int) -> FisherRecord:
    """Write the values that the parameters of `chunks` hold, and last the record; collective.

    Raises:
        SaveFailed: they cannot be written.
    """
    partial = job.folder.with_name(f"{job.folder.name}.partial")
    with failing_together():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with named_failure(partial):
        shards = model_shards(chunks)
        add_prefix_for_sharding(shards, FISHER_PREFIX)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        request = begin_save(shards, partial, strategy, validate=True)
        (request if torch.cuda.is_available() else in_thread(request, None)).execute_sync()
    record: list[FisherRecord | None] = [None]
    with failing_together():
        if dist.get_rank() == 0:
            record = [_seal(partial, job, tokens)]
    dist.broadcast_object_list(record)
    assert record[0] is not None
    return record[0]


def _seal(partial: Path, job: FisherJob, tokens: int) -> FisherRecord:
    files = {str(f.relative_to(partial)): f for f in sorted(partial.rglob("*")) if f.is_file()}
    for file in files.values():
        sync(file)
    versions = {"megatron_cpt": __version__, "torch": torch.__version__, "megatron_core": megatron_core_version}
    record = FisherRecord(
        model=dataclasses.asdict(job.identity),
        data=job.dataset.prefix,
        data_hash=job.dataset.hash,
        samples=job.samples,
        tokens=tokens,
        seq_length=job.config.batch.seq_length,
        seed=job.config.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions,
        file_bytes={name: file.stat().st_size for name, file in files.items()},
    )
    if job.folder.exists():
        job.folder.rmdir()  # it was empty when the job was checked
    partial.replace(job.folder)
    write_atomically(job.folder / RECORD, (json.dumps(record.to_json(), indent=1) + "\n").encode())
    sync(job.folder.parent)
    return record
