"""Which models one may talk to, given a run or a folder: found without loading any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from checkpoint_convert.hf import is_hf
from checkpoint_convert.peft import is_peft, read_peft
from checkpoint_convert.receipt import RECEIPT
from megatron_cpt.errors import CheckpointError, ConversionError
from megatron_cpt.runs.adapters import adapters_of
from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.folder import RunFolder, read_resolved

Kind = Literal["model", "adapters", "checkpoint"]
BASE = "base"


@dataclass(frozen=True)
class Voice:
    """A model that one may talk to.

    Attributes:
        name: how it is called in a list, unique in it.
        kind: a Hugging Face folder, a folder of adapters alone, or a Megatron checkpoint, which is exported first.
        alone: it holds adapters alone.
        export: of a checkpoint, the folder that its export gets, or has.
        base: of adapters, the model that they were trained on; None where nothing says it.
    """

    name: str
    path: Path
    kind: Kind
    alone: bool = False
    export: Path | None = None
    base: Path | None = None


def find_voices(place: Path, base: Path | None = None) -> list[Voice]:
    """Return what `place` offers, the first being the one that is meant, and the base model last.

    Args:
        place: a run, one of its checkpoints, an export, or a folder of adapters.
        base: where the base model lies; default: where the run says, if it is still there.

    Raises:
        CheckpointError: a run without a complete checkpoint or export; an export that is not finished; neither of all.
        ConversionError: a folder of adapters that is damaged.
    """
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is not a folder" if place.exists() else f"{place} does not exist",
            hint="name a run, one of its checkpoints, or the folder of an export",
        )
    _refuse_partial(place)
    if (place / "resolved.yaml").is_file() and (place / "checkpoints").is_dir():
        voices, said = list(_of_run(place)), _base_of_run(place)
    elif place.parent.name == "checkpoints" and (place.parent.parent / "resolved.yaml").is_file():
        run = place.parent.parent
        voices, said = [voice for voice in _of_run(run) if voice.path == place], _base_of_run(run)
    elif is_peft(place):
        voices, said = [Voice(place.name, place, "adapters", alone=True)], _existing(read_peft(place).base)
    elif is_hf(place):
        voices, said = [Voice(place.name or str(place), place, "model")], None
    else:
        raise CheckpointError(
            f"{place} is no run and no Hugging Face folder with weights",
            hint="a Megatron checkpoint of elsewhere is exported first: megatron-cpt convert SRC DIR --to hf",
        )
    if not voices:
        raise CheckpointError(
            f"{place} has no complete checkpoint and no export",
            hint=f"megatron-cpt status {place} says where it stands",
        )
    return _with_base(voices, base or said)


def _with_base(voices: list[Voice], base: Path | None) -> list[Voice]:
    if base is None:
        return voices
    voices = [voice if voice.kind == "model" else replace(voice, base=base) for voice in voices]
    return voices if base in (voice.path for voice in voices) else [*voices, Voice(BASE, base, "model")]


def _refuse_partial(place: Path) -> None:
    if place.name.endswith(".partial"):
        raise CheckpointError(
            f"{place} is an export that is not finished",
            hint=f"the same convert command goes on; then {str(place).removesuffix('.partial')}",
        )


def _of_run(run: Path) -> Iterator[Voice]:
    """Checkpoints, newest first, each under its export where it has one; then exports of what is no longer there."""
    exports = dict(_exports(run))
    for path, marker in complete_checkpoints(run / "checkpoints"):
        alone = adapters_of(path) is not None
        export = exports.pop(path.resolve(), run / "export" / (f"{path.name}_peft" if alone else path.name))
        yield Voice(f"{path.name} ({marker.consumed_tokens:,} tokens)", path, "checkpoint", alone, export)
    for export in exports.values():
        alone = is_peft(export)
        yield Voice(export.name, export, "adapters" if alone else "model", alone)


def _exports(run: Path) -> Iterator[tuple[Path, Path]]:
    """Checkpoint -> the folder that it was exported to: in the run, or beside it."""
    for receipt in sorted({*run.glob(f"*/{RECEIPT}"), *run.glob(f"*/*/{RECEIPT}"), *run.parent.glob(f"*/{RECEIPT}")}):
        try:
            told = json.loads(receipt.read_text(encoding="utf-8"))
            source, plain = Path(told["source"]["path"]).resolve(), told.get("merged_from") is None
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if plain and source.is_relative_to(run.resolve()) and (is_hf(receipt.parent) or is_peft(receipt.parent)):
            yield source, receipt.parent


def _base_of_run(run: Path) -> Path | None:
    return _existing(read_resolved(RunFolder(run)).model.init_from)


def _existing(base: str) -> Path | None:
    """The base model where it is still there as a Hugging Face folder."""
    path = Path(base)
    return path if base not in ("", "random") and is_hf(path) else None


def check_voice(voice: Voice) -> None:
    """Raise ConversionError where a voice needs a base model that nothing names."""
    if voice.alone and voice.base is None:
        raise ConversionError(
            f"{voice.path} holds adapters alone, and their base model is not where they say",
            hint="--base DIR names the folder of its weights",
        )
