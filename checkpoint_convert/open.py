"""From a path to a checkpoint: which format it is, where its config.json lies, which iteration is meant."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from checkpoint_convert.checkpoint import Format, IndexedCheckpoint, StoredTensor, Weights, clear_os_errors
from checkpoint_convert.hf import is_hf, read_hf
from checkpoint_convert.legacy import TRACKER, is_legacy, read_legacy
from checkpoint_convert.megatron_config import (
    check_facts,
    config_from_stored,
    refuse_other_models,
    stores_gammas_less_one,
    unknown_fields,
)
from checkpoint_convert.peft import is_peft
from checkpoint_convert.stored_model import BRIDGE_CONFIG, HINT, StoredModel, read_stored_models
from checkpoint_convert.torch_dist import read_adapters, read_torch_dist
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import architecture_from_config, read_architecture, read_config
from megatron_cpt.architecture.families.family import Config
from megatron_cpt.architecture.tensors import hf_tensor_shapes
from megatron_cpt.errors import ConversionError
from megatron_cpt.runs.adapters import adapters_of, refuse_adapters
from megatron_cpt.runs.checkpoints import BEST, checkpoint_path, complete_checkpoints, list_checkpoints, read_best
from megatron_cpt.runs.marker import MARKER

log = logging.getLogger(__name__)
CONFIG = "config.json"
RUN_CONFIG = "resolved.yaml"
ITERATION = re.compile(r"iter_(\d{7,})$")


def open_checkpoint(
    path: Path,
    *,
    hf_config: Path | None = None,
    best: bool = False,
    trust_pickle: bool = False,
    shapes_only: bool = False,
    adapters: bool = False,
) -> IndexedCheckpoint:
    """Recognise and index a checkpoint. No weight is read.

    path: a Hugging Face folder, an `iter_XXXXXXX` folder, a folder of them (its latest is meant), or a run folder
    of our trainer (its latest, or with `best` the one that `checkpoints/best.json` names).
    hf_config: folder with config.json and tokenizer, for a Megatron checkpoint that does not carry them.
    shapes_only: a folder with config.json alone will do; its tensors have no extents.
    adapters: a checkpoint that holds low-rank adapters alone will do; its tensors are theirs, by peft's names.
    """
    with clear_os_errors(f"cannot read {path}"):
        return _open(path, hf_config, best, trust_pickle, shapes_only, adapters)


def _open(
    path: Path, hf_config: Path | None, best: bool, trust_pickle: bool, shapes_only: bool, adapters: bool
) -> IndexedCheckpoint:
    if not path.is_dir():
        raise ConversionError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    if is_peft(path):
        refuse_adapters(path)
    folder, kind = _find_weights(path, best, shapes_only)
    runs = [parent / RUN_CONFIG for parent in (folder, *folder.parents[:2]) if (parent / RUN_CONFIG).is_file()]
    of_a_run = (folder.parent.parent / RUN_CONFIG).is_file() and folder.parent.name == "checkpoints"
    if of_a_run and not (folder / MARKER).is_file():
        raise ConversionError(f"{folder} was not saved to its end: it has no {MARKER}", hint="take another iteration")
    lora = adapters_of(folder) if kind == "torch_dist" else None
    if lora is not None and not adapters:
        refuse_adapters(folder)
    stored = [] if kind == "hf" else read_stored_models(folder)
    if kind == "hf":
        side_dir, config, arch = folder, read_config(folder), read_architecture(folder)
    else:
        side_dir, config = _config_of_megatron(folder, hf_config, stored)
        arch = architecture_from_config(config)
    refuse_other_models(stored, arch)
    weights = read_adapters(folder, arch, lora) if lora else _read(kind, folder, arch, trust_pickle, shapes_only)
    if stores_gammas_less_one(stored):
        weights = weights.with_gammas_less_one()
    check_facts(stored, arch, side_dir / CONFIG)
    dtype = Counter(tensor.dtype for tensor in weights.tensors.values()).most_common(1)[0][0]
    found = ITERATION.search(folder.name)
    return IndexedCheckpoint(
        kind,
        folder,
        replace(arch, dtype=dtype),
        config,
        side_dir,
        weights,
        int(found.group(1)) if found else None,
        next(iter(runs), None),
        lora,
        None,
        unknown_fields(stored),
    )


def _read(kind: Format, folder: Path, arch: Architecture, trust_pickle: bool, shapes_only: bool) -> Weights:
    if kind == "torch_dist":
        return read_torch_dist(folder, arch)
    if kind == "legacy":
        return read_legacy(folder, arch, trust_pickle=trust_pickle)
    if shapes_only and not is_hf(folder):
        shapes = hf_tensor_shapes(arch)
        return Weights({name: StoredTensor(name, shape, arch.dtype, ()) for name, shape in shapes.items()})
    return read_hf(folder, arch, trust_pickle=trust_pickle)


def _find_weights(path: Path, best: bool, shapes_only: bool) -> tuple[Path, Format]:
    """The folder that holds the weights, and their format."""
    if (path / ".metadata").is_file():
        return path, "torch_dist"
    if is_legacy(path):
        return path, "legacy"
    series = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if series != path or (path / TRACKER).is_file() or (path / BEST).is_file() or list_checkpoints(path):
        return _find_weights(_chosen_iteration(series, best), best, shapes_only)
    if is_hf(path) or (shapes_only and (path / "config.json").is_file()):
        return path, "hf"
    if any(path.glob("*.distcp")):
        raise ConversionError(f"{path} holds *.distcp files and no .metadata", hint="the save was not finished")
    if any(path.glob("mp_rank_*")):
        raise ConversionError(
            f"{path} holds mp_rank_* folders without model_optim_rng.pt", hint="copy the whole checkpoint"
        )
    raise ConversionError(
        f"{path} is no checkpoint that we know: no weights of Hugging Face, no .metadata (torch_dist), "
        f"no mp_rank_* (legacy), no {TRACKER}",
        hint="give the folder that holds the weights, or a run folder",
    )


def _chosen_iteration(folder: Path, best: bool) -> Path:
    """The iteration that is meant in a folder of them: of our trainer's the newest that is complete, or the best.

    In a folder of Megatron-LM's, whose iterations have no marker, the one that its tracker names.
    """
    ours = [path for path, _ in complete_checkpoints(folder)]
    if best:
        return _best_iteration(folder, ours)
    if ours:
        return ours[0]
    if (folder.parent / RUN_CONFIG).is_file():
        raise ConversionError(f"{folder} has no finished checkpoint yet", hint="look at the logs of its run")
    if not (folder / TRACKER).is_file():
        raise ConversionError(f"{folder} has no {TRACKER}", hint="name the iteration's folder")
    text = (folder / TRACKER).read_text(encoding="utf-8").strip()
    name = text if text == "release" else f"iter_{text:0>7}"
    if not (folder / name).is_dir():
        raise ConversionError(f"{folder / TRACKER} names {name}, which is not in {folder}")
    return folder / name


def _best_iteration(folder: Path, ours: list[Path]) -> Path:
    file, found = folder / BEST, read_best(folder)
    if found is None:
        if file.is_file():
            raise ConversionError(f"{file} names no iteration", hint="it is damaged; leave --best out")
        raise ConversionError(f"no {file}", hint="the run has not evaluated yet; leave --best out to take the latest")
    path = checkpoint_path(folder, found["iteration"])
    if path not in ours:
        raise ConversionError(
            f"{file} names {path.name}, which is no complete checkpoint in {folder}",
            hint="leave --best out to take the latest",
        )
    return path


def _config_of_megatron(folder: Path, hf_config: Path | None, stored: list[StoredModel]) -> tuple[Path, Config]:
    """The folder of a Megatron checkpoint's tokenizer, and its config.json: the one there, or one that is made."""
    side_dir = _find_side_dir(folder, hf_config)
    if side_dir is not None and (side_dir / CONFIG).is_file():
        return side_dir, read_config(side_dir)
    if not stored:
        raise ConversionError(
            f"{folder} does not say which model it is: no config.json in hf/, in or above it, or beside {TRACKER}; no "
            f"{BRIDGE_CONFIG}, no args",
            hint=HINT,
        )
    tokenizer = side_dir or _stored_tokenizer(folder, stored[0])
    config = config_from_stored(stored[0], tokenizer)
    log.warning(
        "config.json is made from %s; --hf-config DIR takes the base model's own, and its tokenizer", stored[0].path
    )
    return tokenizer or folder, config


def _find_side_dir(folder: Path, hf_config: Path | None) -> Path | None:
    """Where config.json and the tokenizer of a Megatron checkpoint lie; None when it carries none.

    In --hf-config; in `hf/` in or above the iteration (ours); beside the tracker or in the iteration (Pai-Megatron).
    """
    if hf_config is not None:
        return hf_config.parent if hf_config.is_file() else hf_config
    in_series = ITERATION.search(folder.name) or folder.name == "release"
    above = (folder, *folder.parents[:2]) if in_series else (folder,)
    places = [parent / "hf" for parent in above] + [folder]
    if in_series and (folder.parent / TRACKER).is_file():
        places.append(folder.parent)
    return next((place for place in places if (place / CONFIG).is_file()), None)


def _stored_tokenizer(folder: Path, stored: StoredModel) -> Path | None:
    """The tokenizer's folder: Megatron-Bridge's `tokenizer/`, beside the tracker, or the one that the args name."""
    named = stored.fields.get("tokenizer_model")
    places = [folder / "tokenizer", folder, folder.parent, *([Path(named)] if isinstance(named, str) else [])]
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)
