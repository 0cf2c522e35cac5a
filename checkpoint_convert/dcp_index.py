"""The index of a torch_dist checkpoint: `.metadata`, a pickled `torch.distributed.checkpoint` Metadata.

Stand-ins with the fields of PyTorch's classes are read and written under PyTorch's names, so that neither needs
torch, and reading can run nothing. The tests load what is written here with PyTorch and the reverse.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_convert.archive import STORAGE_NAMES
from megatron_cpt.errors import ConversionError


class Size(tuple[int, ...]):
    """torch.Size."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (tuple(self),)


class Dtype(str):
    """torch.bfloat16 and the like, by name."""

    def __reduce__(self) -> str:
        return str(self)


class _Layout(str):
    def __reduce__(self) -> tuple[Any, ...]:
        return _Layout, ("torch.strided",)


class _MemoryFormat(int):
    def __reduce__(self) -> tuple[Any, ...]:
        return _MemoryFormat, (0,)  # contiguous


@dataclass
class TensorProperties:
    dtype: str

    def __getstate__(self) -> tuple[Any, ...]:
        return Dtype(self.dtype), _Layout(), False, _MemoryFormat(), False

    def __setstate__(self, state: tuple[Any, ...] | dict[str, Any]) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


@dataclass
class ChunkStorageMetadata:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass
class TensorStorageMetadata:
    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    pass


@dataclass(frozen=True)
class MetadataIndex:
    fqn: str
    offset: tuple[int, ...] | None = None
    index: int | None = field(hash=False, compare=False, default=None)


@dataclass
class StorageInfo:
    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if value is not None}


@dataclass
class Metadata:
    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: Any = None
    storage_data: dict[MetadataIndex, StorageInfo] = field(default_factory=dict)
    storage_meta: Any = None
    version: Any = None


class _Inert:
    """Stands in for what the index may hold beside: it never carries a chunk."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
# PyTorch's module and name -> stand-in. Whole names: a pickle may also ask for `os.system` of a module that
# happens to import `os`.
STAND_INS: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): Metadata,
    (_METADATA, "MetadataIndex"): MetadataIndex,
    (_METADATA, "TensorStorageMetadata"): TensorStorageMetadata,
    (_METADATA, "BytesStorageMetadata"): BytesStorageMetadata,
    (_METADATA, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.serialization", "_get_layout"): _Layout,
    ("torch", "Size"): Size,
}
_WRITTEN = {stand_in: name for name, stand_in in STAND_INS.items()}
INERT = {(_METADATA, "StorageMeta")} | {
    ("torch.distributed.checkpoint.planner", name) for name in ("SavePlan", "WriteItem", "TensorWriteData")
}
INERT |= {("torch.distributed.checkpoint.planner", "WriteItemType")}
INERT |= {("torch.distributed.checkpoint.filesystem", "_StoragePrefix")}  # from the second save of a process on
HARMLESS: dict[tuple[str, str], Any] = {
    (module, name): lambda *parts: "/".join(parts)
    for module in ("pathlib", "pathlib._local")  # the second: as Python 3.13 writes it
    for name in ("Path", "PosixPath")
} | {("collections", "OrderedDict"): dict}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # the second: how Megatron-Core's planner flattened tensors; never true of weights
        if (module, name) in INERT or module == "megatron.core.dist_checkpointing.strategies.torch":
            return type(name, (_Inert,), {})
        if module == "torch" and (name in STORAGE_NAMES or name.startswith(("float", "complex", "uint", "int"))):
            return Dtype(name)
        if module == "torch" and name in ("strided", "contiguous_format", "preserve_format", "channels_last"):
            return name
        found = STAND_INS.get((module, name)) or HARMLESS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


class _IndexPickler(pickle._Pickler):
    """Writes the stand-ins under the names of PyTorch's classes."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module, name = ("torch", str(obj)) if isinstance(obj, Dtype) else _WRITTEN[obj]
        self.write(f"c{module}\n{name}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def read_index(path: Path) -> Metadata:
    """The index of the checkpoint in the folder `path`."""
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if isinstance(metadata, Metadata):
            assert isinstance(metadata.state_dict_metadata, dict) and isinstance(metadata.storage_data, dict)
    except pickle.UnpicklingError as error:
        if "." in str(error) and " " not in str(error):
            raise ConversionError(f"{path}/.metadata asks for a type outside the allow-list: {error}") from error
        raise ConversionError(f"{path}/.metadata is damaged: {error}", hint="the save was not finished") from error
    except OSError:
        raise
    except Exception as error:  # whatever broken bytes do to pickle
        text = str(error) or type(error).__name__
        raise ConversionError(f"{path}/.metadata is damaged: {text}", hint="the save was not finished") from error
    if not isinstance(metadata, Metadata):
        raise ConversionError(f"{path}/.metadata is not the index of a torch_dist checkpoint")
    return metadata


def index_bytes(metadata: Metadata) -> bytes:
    buffer = io.BytesIO()
    _IndexPickler(buffer, protocol=2).dump(metadata)
    return buffer.getvalue()
