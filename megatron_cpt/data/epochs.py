"""One source as an endless stream of tokens: epoch after epoch, each a one-epoch Megatron-Core `GPTDataset`.

Every epoch has its own seed, so the order of epoch e never depends on how many epochs the budget needs: a
longer budget only adds epochs. Within an epoch Megatron-Core shuffles the documents, packs them and cuts blocks
of `block_tokens`, and shuffles the blocks. The tokens after the last whole block of an epoch (fewer than
`block_tokens`, other ones in each epoch) are left out.

The indices of the first `EPOCHS_ON_DISK` epochs are built by `build_indices`, before any process group exists, under a
file lock, and renamed into place when they are whole. Their key is the dataset's content, not its path. A later epoch,
of which a small dataset may have hundreds of thousands, and one whose files were lost, is built in the memory of each
rank that reaches it: the same index, as its seed alone decides it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_cpt.corpus.dataset.soundness import foreign_id
from megatron_cpt.data.datasets import Dataset
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

EPOCHS_ON_DISK = 64  # five files each; a large dataset, whose index takes long, is not read more often than that
_REPORT_SECONDS = 10.0
_INDEX_FILES = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt")


@dataclass(frozen=True)
class _TokenizerFacts:
    """All that GPTDataset asks of a tokenizer."""

    eod: int
    vocab_size: int
    hash: str
    pad: int = -1  # an id that no dataset holds

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"dataset": self.hash}


class EpochStream:
    """The tokens of one source, in training order."""

    def __init__(self, dataset: Dataset, block_tokens: int, seed: int, cache_dir: Path) -> None:
        self.dataset = dataset
        self.block_tokens = block_tokens
        self.seed = seed
        self.cache_dir = cache_dir
        self.blocks_per_epoch = (dataset.tokens - 1) // block_tokens
        self.epoch = lru_cache(maxsize=2)(self._open)

    @cached_property
    def _indexed(self) -> IndexedDataset:
        return IndexedDataset(self.dataset.prefix, multimodal=False, mmap=True)

    def _config(self, epoch: int, cache_dir: Path | None) -> GPTDatasetConfig:
        digest = hashlib.sha256(f"epoch {self.seed} {self.dataset.name} {epoch}".encode()).digest()
        config = GPTDatasetConfig(
            random_seed=int.from_bytes(digest[:4], "big"),
            sequence_length=self.block_tokens,
            blend=([self.dataset.prefix], None),
            split="1,0,0",
            path_to_cache=None if cache_dir is None else str(cache_dir),
            tokenizer=_TokenizerFacts(self.dataset.eod_id, self.dataset.vocab_size, self.dataset.hash),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        config.mock = cache_dir is None  # all that it changes here: without a folder every rank builds, in memory
        return config

    def _folder(self, epoch: int) -> Path:
        """The folder of this epoch's index, a function of everything that it depends on."""
        key = f"{self.dataset.hash} {self.dataset.name} {self.block_tokens} {self.seed} {epoch}"
        return self.cache_dir / hashlib.sha256(key.encode()).hexdigest()[:24]

    def _dataset(self, epoch: int, folder: Path | None) -> GPTDataset:
        documents = np.arange(len(self._indexed.sequence_lengths), dtype=np.int32)
        # The dataset's hash in the place of its path: the name of the cache files follows the content.
        return GPTDataset(self._indexed, self.dataset.hash, documents, None, Split.train, self._config(epoch, folder))

    def build_index(self, epoch: int) -> bool:
        """Build the index of `epoch` unless it is there; True when it was built. Call it under `index_lock`."""
        folder = self._folder(epoch)
        if folder.is_dir():
            return False
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        built = self._dataset(epoch, partial)
        assert len(built) == self.blocks_per_epoch, (len(built), self.blocks_per_epoch)
        partial.replace(folder)
        return True

    def _open(self, epoch: int) -> GPTDataset:
        folder = self._folder(epoch)
        whole = all(any(folder.glob(f"*{name}")) for name in _INDEX_FILES)
        return self._dataset(epoch, folder if whole else None)

    def _pieces(self, position: int, tokens: int) -> Iterator[tuple[int, int, slice]]:
        """(epoch, block of that epoch, tokens of that block) that hold [position, position + tokens)."""
        end = position + tokens
        while position < end:
            block, start = divmod(position, self.block_tokens)
            stop = min(self.block_tokens, start + end - position)
            yield *divmod(block, self.blocks_per_epoch), slice(start, stop)
            position += stop - start

    def read(self, position: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, labels), int64 [tokens]: the stream from token `position` on, over block and epoch borders.

        Raises:
            DataError: an id is outside the vocabulary; before the job only a sample of them was looked at.
        """
        parts = [(self.epoch(epoch)[block], cut) for epoch, block, cut in self._pieces(position, tokens)]
        inputs, labels = (_joined([sample[name][cut] for sample, cut in parts]) for name in ("tokens", "labels"))
        # A GPU would end in an assertion of its kernels, and under tensor parallelism embed such an id as zeros.
        for ids in (inputs, labels):
            if (wrong := foreign_id(ids.numpy(), self.dataset.vocab_size)) is not None:
                raise DataError(
                    f"dataset {self.dataset.name!r}: the id {wrong:,} is outside the vocabulary of "
                    f"{self.dataset.vocab_size:,}",
                    hint=f"megatron-cpt verify {self.dataset.prefix}",
                )
        return inputs, labels

    def documents(self, position: int, tokens: int) -> list[int]:
        """Indices of the documents (sequences of the .idx) that the sample at `position` was cut from."""
        found: list[int] = []
        for epoch, block, _ in self._pieces(position, tokens):
            found += self.epoch(epoch)._query_document_sample_shuffle_indices(block)[1].tolist()
        return list(dict.fromkeys(found))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def index_lock(cache_dir: Path) -> Iterator[None]:
    """Only one process builds; the others wait here, outside any collective, and find the work done."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_indices(streams: Iterable[tuple[EpochStream, int]], cache_dir: Path) -> int:
    """Build what is missing of the first epochs of each stream, so many as given or as are kept on disk.

    Returns:
        The number of indices built.
    """
    wanted = [(stream, epoch) for stream, epochs in streams for epoch in range(min(epochs, EPOCHS_ON_DISK))]
    built, reported = 0, time.monotonic()
    with index_lock(cache_dir):
        for done, (stream, epoch) in enumerate(wanted):
            if time.monotonic() - reported >= _REPORT_SECONDS:
                logger.info("data indices: %d of %d, now epoch %d of %s", done, len(wanted), epoch, stream.dataset.name)
                reported = time.monotonic()
            built += stream.build_index(epoch)
    if built:
        logger.info("built %d data indices in %s", built, cache_dir)
    return built


def _of_note(record: logging.LogRecord) -> bool:
    """Neither what Megatron-Core tells of each index, nor that one was not saved, which is so on purpose."""
    return record.levelno > logging.INFO and "path_to_cache is None" not in record.getMessage()


logging.getLogger(GPTDataset.__module__).addFilter(_of_note)
