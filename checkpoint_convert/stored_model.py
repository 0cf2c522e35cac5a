"""What Megatron stored about a model beside its weights, read without torch, without Megatron and without running code.

Megatron-Bridge writes `run_config.yaml` into the iteration's folder; its `model` section holds the fields of
Megatron-Core's TransformerConfig. Megatron-LM stores its command line, an argparse.Namespace, as `args` in
`common.pt` (torch_dist; since Megatron-Core 0.19 in the shard `common_state`) or in each rank's file (legacy). Neither
holds a tokenizer.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from checkpoint_convert.archive import zip_records
from checkpoint_convert.dcp_index import read_index
from megatron_cpt.errors import ConversionError

COMMON_STATE = "common_state"
BRIDGE_CONFIG = "run_config.yaml"
HINT = "give --hf-config DIR, the Hugging Face folder of the base model (config.json and tokenizer)"


@dataclass(frozen=True)
class StoredModel:
    """Fields by Megatron's names, and the file that holds them."""

    path: Path
    fields: dict[str, Any]


def read_stored_models(folder: Path) -> list[StoredModel]:
    """Every description in a checkpoint's folder: Megatron-Bridge's first, then Megatron-LM's args."""
    found = []
    if (folder / BRIDGE_CONFIG).is_file():
        found.append(StoredModel(folder / BRIDGE_CONFIG, _bridge_fields(folder / BRIDGE_CONFIG)))
    for path in (folder / "common.pt", *sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))[:1]):
        if path.is_file():
            with path.open("rb") as file:
                fields = _args(file, path)
            if fields is not None:
                found.append(StoredModel(path, fields))
    return found + _among_the_shards(folder)


def _among_the_shards(folder: Path) -> list[StoredModel]:
    """The args that Megatron-Core 0.19 writes as a shard."""
    if not (folder / ".metadata").is_file():
        return []
    index = read_index(folder)
    places = [info for key, info in index.storage_data.items() if key.fqn.partition("/")[0] == COMMON_STATE]
    found = []
    for place in places:
        path = folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            stored = file.read(place.length)
        if (fields := _args(io.BytesIO(stored), path)) is not None:
            found.append(StoredModel(path, fields))
    return found


def _bridge_fields(path: Path) -> dict[str, Any]:
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        nested = model.get("transformer") or {}
        return {**model, **nested}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} has no readable `model` section: {error}", hint=HINT) from error


class _Inert:
    """Stands for any type but plain data and Namespace: takes any state, does nothing, has no value."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}" if self.args else type(self).__name__


class _InertUnpickler(pickle.Unpickler):
    """Imports nothing: a file may name any type, and gets a stand-in for it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name.rpartition(".")[2], (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()  # a tensor's storage


def _args(file: BinaryIO, path: Path) -> dict[str, Any] | None:
    """The `args` in what torch.save wrote; None when it holds none, or is of PyTorch's format before 1.6."""
    if file.read(2) != b"PK":
        return None  # who reads the weights from it says what is wrong
    try:
        record = zip_records(file)["data.pkl"]
        file.seek(record.offset)
        state = _InertUnpickler(io.BytesIO(file.read(record.nbytes))).load()
    except zipfile.BadZipFile as error:
        raise ConversionError(f"{path} cannot be read: {error}", hint="the file is damaged") from error
    except OSError:
        raise
    except Exception as error:  # whatever broken bytes do to pickle
        text = str(error) or type(error).__name__
        raise ConversionError(f"{path} cannot be read: {text}", hint="the file is damaged") from error
    if isinstance(state, list) and len(state) == 1:  # a shard that is no tensor
        (state,) = state
    args = state.get("args") if isinstance(state, dict) else None
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else None
