"""What every format is reduced to: Hugging Face tensors, and the rectangles of files where their bytes lie.

A Hugging Face tensor is a matrix of `rows` x `columns` (a vector is one column). An `Extent` says that a
rectangle of it lies contiguously, row by row, in a file from a byte offset on. A single safetensors file
has one extent per tensor; a Megatron checkpoint has one per key/value group, tensor parallel slice and
chunk. Readers turn a checkpoint into extents, writers plan extents, `stream` copies between the two; so any
format converts to any other, and no step needs more memory than a block of rows.
"""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families.family import Config
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.errors import CheckpointError, ConversionError

Format = Literal["hf", "torch_dist", "legacy", "peft"]  # peft: low-rank adapters alone
FORMATS: tuple[Format, ...] = ("hf", "torch_dist", "legacy")  # of whole models

ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


class MismatchError(ConversionError):
    """Weights do not match what they must match; exit 1, with the list of offenders."""

    exit_code = 1


@dataclass(frozen=True)
class ChecksummedBytes:
    """Bytes of a torch.save archive that one checksum covers; `crc` is 0 where it was not computed."""

    offset: int
    nbytes: int
    crc: int

    @property
    def has_checksum(self) -> bool:
        return self.crc != 0 or self.nbytes == 0


@dataclass(frozen=True, order=True)
class Extent:
    """Rows `row`..., columns `column`... of a tensor lie in `path` from byte `offset` on, without gaps."""

    row: int
    column: int
    rows: int
    columns: int
    path: Path
    offset: int
    record: ChecksummedBytes | None = field(default=None, compare=False, repr=False)  # of the archive around it


@dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str  # key of ITEM_BYTES
    extents: tuple[Extent, ...]
    less_one: bool = False  # a norm's gamma, stored minus 1: the model multiplies by 1 + what is stored

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def has_checksum(self) -> bool:
        """Whether the file stores a checksum of every byte of the tensor."""
        return all(e.record is not None and e.record.has_checksum for e in self.extents)


@dataclass(frozen=True)
class Weights:
    """The weights found in a folder, by Hugging Face name.

    `copies` are further places of the same tensor (a norm on each tensor parallel rank, a tied output layer)
    that must hold the same bytes. `ignored` counts what is deliberately left out, by reason.
    """

    tensors: dict[str, StoredTensor]
    copies: tuple[StoredTensor, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    padding_rows: int = 0  # vocabulary rows of the embedding above the true vocabulary

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_gammas_less_one(self) -> Weights:
        """These weights, of a model that stores the gammas of its norms minus 1."""
        tensors = gammas_less_one(self.tensors)
        return replace(self, tensors=tensors, copies=tuple(replace(c, less_one=is_gamma(c.name)) for c in self.copies))


def is_gamma(name: str) -> bool:
    """Whether a Hugging Face tensor is what a norm multiplies by."""
    return name.endswith("norm.weight")


def gammas_less_one(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, those of norms stored minus 1."""
    return {name: replace(tensor, less_one=is_gamma(name)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight: scale * B A, with A [rank, columns] and B [rows, rank]."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.a, self.b


@dataclass(frozen=True)
class Toward:
    """How far a weight is moved towards another model's: from 0, where it stays, to 1, where it becomes that one."""

    other: StoredTensor
    by: float

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.other,)


Update = LowRank | Toward


@dataclass(frozen=True)
class Merge:
    """What is done to weights on their way, by their names: adapters are added, or another model is mixed in."""

    path: Path  # the folder that holds the adapters, or the other model
    lora: LoraConfig | None
    updates: Mapping[str, Update]
    other: IndexedCheckpoint | None = None
    share: float = 1.0  # of the weights themselves, where another model's are mixed in


@dataclass(frozen=True)
class IndexedCheckpoint:
    """A checkpoint that was found, recognised and indexed; no weight has been read."""

    format: Format
    path: Path  # the folder of the weights
    arch: Architecture
    config: Config  # the Hugging Face config.json
    side_dir: Path  # where config.json and the tokenizer lie
    weights: Weights
    iteration: int | None = None
    run_config: Path | None = None  # resolved.yaml of the run that trained it
    lora: LoraConfig | None = None  # settings of the adapters that `weights` are, by peft's names; None: a whole model
    merge: Merge | None = None  # adapters to add to these weights
    unknown_fields: tuple[str, ...] = ()  # `name = value` of what Megatron stored and `megatron_fields` does not know

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run that these weights are a checkpoint or an export of; None when they lie elsewhere."""
        for folder in (self.path, *self.path.absolute().parents[:3]):
            if (folder / "resolved.yaml").is_file() and (folder / "checkpoints").is_dir():
                return folder
        return None

    @property
    def gammas_less_one(self) -> bool:
        """Whether the norms' gammas are stored minus 1."""
        return any(tensor.less_one for tensor in self.weights.tensors.values())


@contextlib.contextmanager
def clear_os_errors(what: str) -> Iterator[None]:
    """Errors of the file system are for the user to fix: one line, no traceback."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConversionError(
            f"{what}: {where}{error.strerror or error}", hint=_OS_HINTS.get(error.errno or 0)
        ) from error


@contextlib.contextmanager
def as_checkpoint_error(folder: Path) -> Iterator[None]:
    """What this package refuses of the weights in `folder`, as an error of the run that wants to start from them."""
    try:
        with clear_os_errors(f"cannot read {folder}"):
            yield
    except ConversionError as error:
        raise CheckpointError(error.message, hint=error.hint) from error


_OS_HINTS = {
    errno.ENOSPC: "free some disk space and start again: it continues from here",
    errno.EDQUOT: "your quota is used up; free some space and start again: it continues from here",
    errno.EACCES: "check the owner and permissions of the folder",
    errno.EPERM: "check the owner and permissions of the folder",
    errno.EROFS: "the file system is read-only; name another folder",
}


def check_cover(tensor: StoredTensor) -> None:
    """Raise MismatchError unless the extents cover the tensor, each element once: DCP itself does not report holes."""
    covered = sum(e.rows * e.columns for e in tensor.extents)
    wanted = tensor.rows * tensor.columns
    if covered < wanted:
        raise MismatchError(
            f"{tensor.name}: the checkpoint holds {covered} of its {wanted} elements",
            hint="a chunk is missing: the save was not finished, or a file was lost",
        )
    active: list[Extent] = []
    for extent in sorted(tensor.extents):
        active = [e for e in active if e.row + e.rows > extent.row]
        for e in active:
            if e.column < extent.column + extent.columns and extent.column < e.column + e.columns:
                raise MismatchError(f"{tensor.name}: two chunks of the checkpoint overlap at row {extent.row}")
        active.append(extent)


def check_names(wanted: Iterable[str], found: Iterable[str], where: object) -> None:
    """Raise MismatchError listing every name that is missing or has no place."""
    wanted, found = set(wanted), set(found)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if not missing and not extra:
        return
    lines = [f"missing: {name}" for name in missing] + [f"not mapped: {name}" for name in extra]
    shown = "\n  ".join(lines[:40] + ([f"... and {len(lines) - 40} more"] if len(lines) > 40 else []))
    raise MismatchError(
        f"{where}: {len(missing)} tensors missing, {len(extra)} that the model has no place for\n  {shown}",
        hint="does config.json (tie_word_embeddings, num_hidden_layers, model_type) describe these weights?",
    )


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: object) -> None:
    if tuple(found) != tuple(wanted):
        raise MismatchError(f"{where}: {name} has shape {tuple(found)}, config.json asks for {tuple(wanted)}")


def check_dtype(name: str, dtype: str, where: object) -> str:
    if dtype not in ITEM_BYTES:
        raise ConversionError(f"{where}: {name} is stored as {dtype}; supported are {', '.join(ITEM_BYTES)}")
    return dtype
