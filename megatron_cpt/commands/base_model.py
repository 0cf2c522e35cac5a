"""The base model of a run, for the commands that put something on top of it or mix it in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.errors import ConversionError

if TYPE_CHECKING:
    from checkpoint_convert.checkpoint import IndexedCheckpoint


def place_of_base(src: Path, said: str, given: Path | None) -> Path:
    place = given or Path(said)
    if given is None and said == "random":
        raise ConversionError(f"the base of {src} was drawn at random and never saved", hint="train all its weights")
    if not (given or said) or not place.is_dir():
        raise ConversionError(
            f"the base model of {src} {f'is not at {place}' if given or said else 'is not named there'}",
            hint="--base-model DIR names the folder of its weights",
        )
    return place


def check_base(source: IndexedCheckpoint, base: IndexedCheckpoint) -> None:
    """Raise ConversionError unless `base` is, by content, what the run of `source` started from."""
    from checkpoint_convert.peft import rope_of
    from megatron_cpt.launch.identity import check_identity, identity_of
    from megatron_cpt.launch.origin import Origin
    from megatron_cpt.runs.folder import RunFolder

    run = RunFolder(source.path.parent.parent)
    if base.format in ("hf", "torch_dist") and (run.root / "identity.json").is_file():
        origin = Origin(base.format, base.path)
        if changes := check_identity(run, identity_of(base.side_dir, origin, rope=rope_of(source))):
            said = "; ".join(map(str, changes))
            raise ConversionError(
                f"{base.path} is not the model that {source.path} was trained on: {said}",
                hint="--base-model DIR names the folder of its weights",
            )
