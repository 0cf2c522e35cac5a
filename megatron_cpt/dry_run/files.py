"""What can be read of a run without reading a weight or a token: headers of the weights, indices of the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoint_convert.checkpoint import Weights, as_checkpoint_error
from checkpoint_convert.hf import read_hf
from checkpoint_convert.torch_dist import read_torch_dist
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.trainable import trainable_of
from megatron_cpt.launch.origin import Origin, resolve_origin
from megatron_cpt.launch.survey import Survey
from megatron_cpt.runs.checkpoints import complete_checkpoints, format_bytes


def read_headers(survey: Survey) -> tuple[str, ...]:
    """Return a line for each thing that is on this machine and was found sound. What is not here is in the survey.

    The survey has opened the datasets already.

    Raises:
        CheckpointError: the weights are not those that config.json describes.
    """
    return tuple(_lines(survey))


def _lines(survey: Survey) -> Iterator[str]:
    folder = _weights_folder(survey)
    if folder is not None:
        weights = _read_weights(folder, survey.arch)
        yield (
            f"weights: the headers of {len(weights.tensors):,} tensors, {format_bytes(weights.nbytes)}, in "
            f"{folder.weights} are those of config.json"
        )
    for source in survey.sources:
        if source.available_tokens is not None:
            yield f"data: the .bin of {source.name!r} is as its .idx says, {source.available_tokens:,} tokens"


def _weights_folder(survey: Survey) -> Origin | None:
    """Where the next start takes the weights from: the run's newest checkpoint, else what `init_from` names."""
    config = survey.config
    newest = complete_checkpoints(Path(config.folder) / "checkpoints")
    if newest and trainable_of(config, survey.arch).saves_every_weight:
        return Origin("torch_dist", newest[0][0])
    origin = resolve_origin(config.model.init_from)
    return origin if origin.kind in ("hf", "torch_dist") else None


def _read_weights(origin: Origin, arch: Architecture) -> Weights:
    with as_checkpoint_error(origin.weights):
        read = read_torch_dist if origin.kind == "torch_dist" else read_hf
        return read(origin.weights, arch)
